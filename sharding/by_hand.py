"""Sharding by hand: a computation in one `shard_map` over the whole mesh, every collective written.

XLA's partitioner finds where data must move by itself, and for a step of 671B it finds too much;
here nothing is left to choose. What each device computes is its share of the result:

    weights      are split over every mesh axis along which devices have different tokens, gathered
                 a layer at a time, and their gradients reduced by scattering (`gathered`)
    partial sums where a contracted dimension is split (`summed`): heads, mlp, vocab
    the loss     each device differentiates its own share; the sum over all devices is the loss. A
                 value that several devices hold alike is that many values, each with its part of
                 the gradient, and sums of parts are what `psum` and `psum_scatter` make

The functions below do nothing outside `by_hand`, so the same modules run under XLA's partitioner.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from sharding.context_parallel import all_places, local_places
from sharding.rules import Layout, current_layout, use_layout

Gathers = tuple[tuple[int, tuple[str, ...]], ...]
"""Dimensions, and the mesh axes to gather each over."""


def by_hand(function: Callable[..., Any], places: Any, result_places: Any) -> Callable[..., Any]:
    """The same function of whole arrays, computed by each device on its own parts.

    Args:
        function: of arrays; inside, they are parts, and the functions of this module act.
        places: a `PartitionSpec` for each argument, or a tree of them.
        result_places: the same for what it returns.

    Outside `use_layout` there is one device, and the function is returned as it is.
    """
    layout = current_layout()
    if layout is None:
        return function
    inside = dataclasses.replace(layout, by_hand=True)

    def on_a_device(*arguments: Any) -> Any:
        with use_layout(inside):
            return function(*arguments)

    return jax.shard_map(
        on_a_device, mesh=layout.mesh, in_specs=places, out_specs=result_places, check_vma=False
    )


def gathered(weight: Array, axes: tuple[str, ...], dtype: DTypeLike, wide: bool = False) -> Array:
    """A weight as the computation needs it: cast, then whole along all axes that have tokens.

    Cast first, so that half the bytes travel. The gradient travels in the weight's own dtype: what
    many devices add up is added in float32.

    Args:
        wide: rounded to `dtype`, but in the dtype of the weight. A gradient comes in the dtype of
            the result, so it need not be rounded before it is added up.
    """
    layout = _inside()
    missing = () if layout is None else map(layout.gathered_axes, axes)
    gathers = tuple((dim, over) for dim, over in enumerate(missing) if over)
    if not gathers and not wide:
        return weight.astype(dtype)
    dtype = jnp.dtype(dtype)
    return _gather(weight, gathers, dtype, weight.dtype if wide else dtype)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight: Array, gathers: Gathers, dtype: jnp.dtype, result: jnp.dtype) -> Array:
    part = weight.astype(dtype)
    for dim, axes in gathers:
        part = lax.all_gather(part, axes, axis=dim, tiled=True)
    return part.astype(result)


def _gather_forward(
    weight: Array, gathers: Gathers, dtype: jnp.dtype, result: jnp.dtype
) -> tuple[Array, Array]:
    # An empty slice remembers the dtype, which is no array.
    return _gather(weight, gathers, dtype, result), jnp.zeros((0,), weight.dtype)


def _gather_backward(
    gathers: Gathers, dtype: jnp.dtype, result: jnp.dtype, kept: Array, gradient: Array
) -> tuple[Array]:
    part = gradient.astype(kept.dtype)
    for dim, axes in reversed(gathers):
        part = lax.psum_scatter(part, axes, scatter_dimension=dim, tiled=True)
    return (part,)


_gather.defvjp(_gather_forward, _gather_backward)


def is_gathering() -> bool:
    """Whether weights are gathered now."""
    layout = _inside()
    return layout is not None and bool(layout.token_axes)


def summed(x: Array, *names: str) -> Array:
    """The sum over the devices among which a contraction over these dimensions was split."""
    axes = _split(*names)
    return lax.psum(x, axes) if axes else x


def of_all_owners(x: Array, name: str) -> Array:
    """Tokens [T, ...] of all devices that own a part of this dimension, one after the other."""
    axes = _with_tokens(name)
    return lax.all_gather(x, axes, tiled=True) if axes else x


def summed_by_owner(x: Array, name: str) -> Array:
    """The sum over the devices that own parts of this dimension; each keeps its own tokens.

    `x` is [n T, ...], as `of_all_owners` has them.
    """
    axes = _with_tokens(name)
    others = tuple(axis for axis in _split(name) if axis not in axes)
    x = lax.psum_scatter(x, axes, tiled=True) if axes else x
    return lax.psum(x, others) if others else x


def largest(x: Array, *names: str) -> Array:
    """The largest value over the same devices."""
    axes = _split(*names)
    return lax.pmax(x, axes) if axes else x


def is_split(name: str) -> bool:
    """Whether devices hold different parts of this dimension now."""
    return bool(_split(name))


def first_place(name: str, size: int) -> Array | int:
    """Where this device's part of a dimension begins, when each part has `size` places."""
    axes = _split(name)
    return lax.axis_index(axes) * size if axes else 0


def travel_axis(name: str) -> str | None:
    """The one mesh axis that this dimension is split over, if any: along it data travel.

    For "sequence", where latents go round a ring, and "expert", where tokens go to their experts.
    """
    axes = _split(name)
    return axes[0] if axes else None


def sequence_part(x: Array) -> Array:
    """This device's places of [B, S, ...]; integers of every place are on every device."""
    axis = travel_axis("sequence")
    return x if axis is None else local_places(x, axis)


def whole_sequence(x: Array) -> Array:
    """Every place of [B, S, ...], of which this device has `sequence_part`: for small arrays."""
    axis = travel_axis("sequence")
    return x if axis is None else all_places(x, axis)


def summed_over_copies(x: Array, axes: tuple[str, ...]) -> Array:
    """A gradient's sum over the mesh axes along which its weight, of these axes, is not split."""
    layout = _inside()
    if layout is None:
        return x
    split = {axis for name in axes for axis in layout.rules[name]}
    missing = tuple(a for a, size in layout.mesh.shape.items() if size > 1 and a not in split)
    return lax.psum(x, missing) if missing else x


def copies() -> int:
    """How many devices compute the same tokens, and so the same loss."""
    layout = _inside()
    if layout is None:
        return 1
    return layout.mesh.size // math.prod(layout.mesh.shape[axis] for axis in layout.token_axes)


def summed_over_tokens(x: Array) -> Array:
    """The sum over all devices that have different tokens."""
    layout = _inside()
    axes = () if layout is None else layout.token_axes
    return lax.psum(x, axes) if axes else x


def _inside() -> Layout | None:
    layout = current_layout()
    return layout if layout is not None and layout.by_hand else None


def _with_tokens(name: str) -> tuple[str, ...]:
    """Of the mesh axes that a dimension is split over, those along which tokens differ."""
    layout = _inside()
    return () if layout is None else tuple(a for a in _split(name) if a in layout.token_axes)


def _split(*names: str) -> tuple[str, ...]:
    layout = _inside()
    if layout is None:
        return ()
    return tuple(dict.fromkeys(axis for name in names for axis in layout.split_axes(name)))
