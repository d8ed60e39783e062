"""One of several implementations, by the platform that will compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax

from sharding.rules import current_layout


def by_platform(
    *arguments: Any, default: Callable[..., Any], **platforms: Callable[..., Any]
) -> Any:
    """`jax.lax.platform_dependent`, decided here where there is a layout: its mesh has devices.

    What is left to XLA is a branch with one arm, and XLA may move into it what stands around it,
    and start no exchange apart that stands in it.
    """
    if (layout := current_layout()) is None:
        return lax.platform_dependent(*arguments, default=default, **platforms)
    return platforms.get(layout.mesh.devices.flat[0].platform, default)(*arguments)
