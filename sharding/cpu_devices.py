"""A CPU that stands for several devices: meshes on one machine, and a device for each core."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax
from jax._src import xla_bridge

from dsjax.config import MOST_CPU_DEVICES

_COUNT = "--xla_force_host_platform_device_count"
# Devices of a CPU otherwise start independent collectives in orders of their own, and hang.
_IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def make_cpu_devices(wanted: int, processes: int = 1) -> None:
    """Let this process's CPU be its share of the `wanted` devices.

    Does nothing where jax has an accelerator, or has its devices already. Who has said how many
    there are, in XLA_FLAGS or in jax's own configuration, is obeyed.
    """
    alone = wanted == processes == 1
    if alone or xla_bridge.backends_are_initialized() or not _only_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_IN_ORDER}"
    said = _COUNT in flags or jax.config.jax_num_cpu_devices >= 0  # pyright: ignore[reportAttributeAccessIssue]
    if not said and processes <= wanted <= MOST_CPU_DEVICES:
        jax.config.update("jax_num_cpu_devices", wanted // processes)


def _only_cpu() -> bool:
    """Whether jax will run on the CPU; to ask it would make its devices."""
    if platforms := jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        return platforms == "cpu"
    return find_spec("libtpu") is None and not entry_points(group="jax_plugins")
