"""Logical axes to mesh axes: the only place that names mesh axes for the model.

A parameter says what its dimensions *are* ("heads", "embed"); a rule table says where they *go*.
The same model runs on any mesh by another table, never by other code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.errors import UserError

Rules = Mapping[str, tuple[str, ...]]

TRAIN_RULES: Rules = {
    # Activations. The batch is spread over the expert axis as well: expert parallelism spends
    # data-parallel ranks, as in DeepSeek-V3 section 3.2.
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": (),
    # Both.
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    # The mesh axis `expert` is the one along which tokens travel to their experts.
    "expert": ("expert",),
    "expert_mlp": ("tensor",),
    # Parameters: split over all devices that have tokens of their own, so that each keeps and
    # updates a part, and gradients are reduced by scattering them.
    "embed": ("fsdp", "expert", "context"),
    "q_lora": ("fsdp", "expert", "context"),
    "kv_lora": ("fsdp", "expert", "context"),
    # Of the experts' stacks the middle dimension: what is gathered along the last one, where
    # numbers are neighbours in memory, has to be turned before it can be multiplied.
    "expert_embed": ("fsdp", "context"),
    "expert_mlp_rows": ("tensor", "fsdp", "context"),
    "expert_input": (),
    # Few: every device holds them all, and needs them for whichever heads it has.
    "kv_heads": (),
    "head_dim": (),
    "latent": (),
    "norm": (),
    "router": (),
    # Scales of FP8, one for 16,384 weights: whoever has a part of a block needs its scale.
    "block": (),
    "layers": (),
}

PREFILL_RULES: Rules = TRAIN_RULES | {
    # A weight is split over `fsdp` where that is asked for, to save memory; where tokens are
    # spread for speed, every device has the weights that all tokens need.
    "embed": ("fsdp",),
    "q_lora": ("fsdp",),
    "kv_lora": ("fsdp",),
    "expert_embed": ("fsdp",),
    "expert_mlp_rows": ("tensor", "fsdp"),
}

DECODE_RULES: Rules = PREFILL_RULES | {
    # One token a row: there is no sequence to split.
    "sequence": (),
    # Few tokens: all devices of a slice can see all of them, and each has experts of its own.
    "expert": ("expert", "tensor"),
    "expert_mlp": (),
    "expert_mlp_rows": ("fsdp",),
}


_TOKENS = ("batch", "sequence")
"""Names of dimensions that are tokens."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh together with the rules that map logical axes onto it."""

    mesh: Mesh
    rules: Rules = dataclasses.field(default_factory=lambda: TRAIN_RULES)
    by_hand: bool = False
    """Inside `sharding.by_hand`: arrays are a device's own parts, and collectives are written."""

    def __post_init__(self) -> None:
        for logical, axes in self.rules.items():
            for axis in axes:
                if axis not in self.mesh.shape:
                    raise UserError(
                        f"rules: {logical!r} goes to mesh axis {axis!r}, but the mesh has "
                        f"{tuple(self.mesh.shape)}; use one of those"
                    )
        if len(cut := self.rules["sequence"]) > 1:
            raise UserError(f"rules: 'sequence' goes to {cut}; a ring has one mesh axis, name one")

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """The `PartitionSpec` of an array whose dimensions carry these logical names.

        Raises:
            UserError: a name is unknown, a mesh axis is wanted twice, the names do not match the
                rank, or a dimension does not divide.
        """
        if len(axes) != len(shape):
            raise UserError(f"axes {axes} name {len(axes)} dimensions, the array has {shape}")
        parts = [self._mesh_axes(name) for name in axes]
        used = [axis for part in parts for axis in part if self.mesh.shape[axis] > 1]
        if len(used) != len(set(used)):
            raise UserError(f"axes {axes} use a mesh axis twice ({used}); change the rules")
        for name, part, size in zip(axes, parts, shape, strict=True):
            ways = math.prod(self.mesh.shape[axis] for axis in part)
            if size % ways:
                divisors = [w for w in range(1, ways + 1) if size % w == 0 and ways % w == 0]
                raise UserError(
                    f"{name}={size} is not divisible by the {ways} devices along mesh axes {part}; "
                    f"choose {' or '.join(map(str, divisors[-2:]))}"
                )
        return PartitionSpec(*(part or None for part in parts))

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """`spec`, bound to the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def ways(self, name: str) -> int:
        """Over how many parts of the mesh a logical axis is split."""
        return math.prod(self.mesh.shape[axis] for axis in self._mesh_axes(name))

    def split_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes along which a dimension stays split while it is computed with.

        A weight is gathered over every axis along which devices have different tokens, except that
        experts stay where they are along the mesh axis `expert`: there the tokens travel.
        """
        axes = tuple(axis for axis in self._mesh_axes(name) if self.mesh.shape[axis] > 1)
        if name in _TOKENS:
            return axes
        stays = ("expert",) if name == "expert" else ()
        return tuple(axis for axis in axes if axis in stays or axis not in self.token_axes)

    def gathered_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes over which a weight's dimension is gathered before it is computed with.

        Raises:
            UserError: one that it stays split over comes later. What is cut along several axes is
                cut by the first one first, so only the last ones can be gathered.
        """
        whole = tuple(axis for axis in self._mesh_axes(name) if self.mesh.shape[axis] > 1)
        stays = self.split_axes(name)
        if whole[: len(stays)] != stays:
            raise UserError(
                f"rules: {name!r} goes to {whole}, and stays split over {stays}; name those first"
            )
        return whole[len(stays) :]

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices have different tokens, in the order of the mesh."""
        spread = {axis for name in _TOKENS for axis in self._mesh_axes(name)}
        return tuple(axis for axis, size in self.mesh.shape.items() if size > 1 and axis in spread)

    def _mesh_axes(self, name: str | None) -> tuple[str, ...]:
        if name is None:
            return ()
        if name not in self.rules:
            raise UserError(f"rules: unknown logical axis {name!r}; known: {sorted(self.rules)}")
        return self.rules[name]


_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[Layout]:
    """Trace and run what is inside under this layout: `constrain` obeys it.

    A jitted function keeps the layout it was first traced under; make a new one for a new layout.
    """
    token = _current.set(layout)
    try:
        # Inside `shard_map`, the mesh is set already.
        with contextlib.nullcontext() if layout.by_hand else jax.set_mesh(layout.mesh):
            yield layout
    finally:
        _current.reset(token)


def current_layout() -> Layout | None:
    """The layout that is being traced under."""
    return _current.get()


def place(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """Where an array of these logical names lies under the current layout."""
    layout = current_layout()
    return PartitionSpec() if layout is None else layout.spec(axes, shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """State where an activation lives, by the logical names of its dimensions.

    Outside `use_layout` the computation follows its inputs, and this does nothing; by hand it is
    where it is.
    """
    layout = _current.get()
    if layout is None or layout.by_hand:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape))
