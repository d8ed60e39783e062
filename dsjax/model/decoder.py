"""The same model over a cache: layers apart instead of stacked, every weight as decoding reads it.

Training scans over stacks of layers; there the slice of a stack is nothing beside the work on it.
Decoding a few tokens does little but read weights: so here every layer has arrays of its own, and
matrices lie with their inputs first. The modules are those of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.architecture import ModelConfig
from dsjax.kernels.paged_attention import Places
from dsjax.kernels.tpu_core import LANES
from dsjax.model.block import Block
from dsjax.model.layers import (
    Embedding,
    Linear,
    RMSNorm,
    scale_of,
    tree_places,
    tree_shardings,
    use,
)
from dsjax.model.mla import MLA
from dsjax.model.moe import Experts
from dsjax.model.mtp import MTPModule
from dsjax.model.rope import rotary_table
from dsjax.model.transformer import Transformer
from sharding.by_hand import by_hand
from sharding.rules import constrain, current_layout

Module = TypeVar("Module", bound=nnx.Module)
Result = TypeVar("Result")

Pages = tuple[Float[Array, "G N T W"], ...]
"""The cache: one array of pages for each layer, and a last one for MTP's."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["embed", "layers", "norm", "head", "mtp"],
    meta_fields=["config", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Decoder:
    """The model, ready to extend sequences over pages. Made by `take_apart`."""

    embed: Embedding
    layers: tuple[Block, ...]
    norm: RMSNorm
    head: nnx.Param[Array]
    """[D, V]."""
    mtp: MTPModule | None
    """The first MTP module; deeper ones are not used."""
    config: ModelConfig
    dtype: Any

    def extend(
        self, tokens: Int[Array, "B Q"], pages: Pages, places: Places
    ) -> tuple[Float[Array, "B Q D"], Pages, Int[Array, "B Q L K"]]:
        """Hidden states of new tokens after the final norm, and the pages with them in.

        And which experts each expert layer sent each token to.
        """
        return self._by_hand(Decoder._extend, tokens, pages, places)

    def _extend(self, tokens: Array, pages: Pages, places: Places) -> tuple[Array, Pages, Array]:
        table = rotary_table(self.config, places.positions)
        x, new, experts = self._embed(tokens), [], [jnp.zeros((*tokens.shape, 0, 0), jnp.int32)]
        for block, mine in zip(self.layers, pages, strict=False):
            x, mine, routing = block.extend(x, table, mine, places)
            new.append(mine)
            if routing is not None:
                experts.append(routing.experts.reshape(*tokens.shape, 1, -1))
        chosen = jnp.concatenate(experts[1:] or experts, axis=2)
        return self.norm(x), (*new, *pages[len(new) :]), chosen

    def look_ahead(
        self,
        next_tokens: Int[Array, "B Q"],
        hidden: Float[Array, "B Q D"],
        pages: Pages,
        places: Places,
    ) -> tuple[Float[Array, "B Q D"], Pages]:
        """MTP's hidden states, after its norm: at place i, from h_i and the token after it.

        `logits` of place i speak of the token two places on.
        """
        return self._by_hand(Decoder._look_ahead, next_tokens, hidden, pages, places)

    def _look_ahead(
        self, next_tokens: Array, hidden: Array, pages: Pages, places: Places
    ) -> tuple[Array, Pages]:
        assert self.mtp is not None  # the engine does not ask a model without
        table = rotary_table(self.config, places.positions)
        embedded = self._embed(next_tokens)
        hidden, last = self.mtp.extend(embedded, hidden, table, pages[-1], places)
        return self.mtp.norm(hidden), (*pages[:-1], last)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """float32 scores of every token of the vocabulary."""
        logits = jnp.einsum("bd,dv->bv", hidden, self.head[...], preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "vocab")

    def _by_hand(self, method: Callable[..., Result], *arguments: Any) -> Result:
        """On a mesh, each device does its part: all arrays begin with the batch, or its groups."""
        layout = current_layout()
        if layout is None:
            return method(self, *arguments)
        rows = layout.spec(("batch",), (layout.ways("batch"),))
        spread = jax.tree.map(lambda _: rows, arguments)
        results = jax.tree.map(lambda _: rows, jax.eval_shape(method, self, *arguments))
        return by_hand(method, (tree_places(self), *spread), results)(self, *arguments)

    def _embed(self, tokens: Array) -> Array:
        return constrain(self.embed(tokens, self.dtype), "batch", "sequence", "residual")


def take_apart(model: Transformer) -> Decoder:
    """A decoder with copies of a model's weights, made a layer at a time.

    `checkpoint.load.load_decoder` makes one of files, without the model.
    """
    c, dtype = model.config, model.dtype
    layers = [
        _placed(_layer_of, stack, index, dtype=dtype)
        for stack, count in (
            (model.dense_layers, c.first_k_dense_replace),
            (model.moe_layers, c.num_moe_layers),
        )
        for index in range(count)
    ]
    mtp = None if model.mtp is None else _placed(_layer_of, model.mtp, 0, dtype=dtype)
    embed, norm = jax.tree.map(jnp.copy, (model.embed, model.norm))
    head = None if model.head is None else model.head.weight
    return assemble(c, dtype, embed, layers, norm, head, mtp)


def assemble(
    config: ModelConfig,
    dtype: Any,
    embed: Embedding,
    layers: Sequence[Block],
    norm: RMSNorm,
    head: nnx.Variable[Array] | None,
    mtp: MTPModule | None,
) -> Decoder:
    """A decoder of its parts: layers and MTP are prepared, the others as they are in a model.

    Without a head the embedding is the head, too.
    """
    head = _placed(_head, embed.weight if head is None else head, dtype=dtype)
    embed = _placed(prepared, embed, dtype=dtype)
    return Decoder(embed, tuple(layers), norm, head, mtp, config, dtype)


def prepare(module: Module, dtype: Any) -> Module:
    """A layer or an MTP module with its weights as decoding reads them, placed as their axes say.

    Matrices are in `dtype`, what the model computes in, so that no step casts them, and lie with
    their inputs first; norms and routers, which compute in float32, stay as they are, and what is
    in FP8 stays so.
    """
    return _placed(prepared, module, dtype=dtype)


def _placed(make: Callable[..., Result], *arguments: Any, dtype: Any) -> Result:
    """What is made, compiled, each array where the current layout says by the names of its axes."""
    layout = current_layout()
    if layout is None:
        return jax.jit(make, static_argnames="dtype")(*arguments, dtype=dtype)
    places = tree_shardings(jax.eval_shape(partial(make, dtype=dtype), *arguments), layout)
    return jax.jit(make, static_argnames="dtype", out_shardings=places)(*arguments, dtype=dtype)


def _layer_of(stack: Module, index: Int[Array, ""], dtype: Any) -> Module:
    return prepared(jax.tree.map(lambda a: a[index], stack), dtype)


def _head(weight: nnx.Variable[Array], dtype: Any) -> nnx.Param[Array]:
    return nnx.Param(use(weight, dtype).T, axes=("embed", "vocab"))


def prepared(module: Module, dtype: Any) -> Module:
    """`prepare`, before it is compiled."""
    for node in _modules(module):
        if isinstance(node, MLA):
            node.split_keys_from_values(dtype)
    for node in _modules(module):  # anew: the split took one away
        if isinstance(node, Linear | Experts):
            node.put_inputs_first()
        if isinstance(node, Linear | Experts | Embedding | MLA):
            for name, variable in vars(node).items():
                if isinstance(variable, nnx.Param) and scale_of(node, name) is None:
                    variable.set_value(variable[...].astype(dtype))
    return module


def _modules(module: nnx.Module) -> list[Any]:
    return [node for _, node in nnx.iter_graph(module)]


def make_pages(
    config: ModelConfig,
    groups: int,
    count: int,
    size: int,
    dtype: Any,
    *,
    mtp: bool,
    backend: str | None = None,
) -> Pages:
    """Empty pages: `count` of `size` tokens in each group, for every layer."""
    layers, width = cache_shape(config, mtp=mtp, backend=backend)
    return tuple(jnp.zeros((groups, count, size, width), dtype) for _ in range(layers))


def cache_shape(config: ModelConfig, *, mtp: bool, backend: str | None = None) -> tuple[int, int]:
    """Layers that remember, MTP's among them if it is used, and numbers a token in each.

    On a TPU (the backend, by default jax's own) wide ones fill whole lanes, as they would in its
    memory anyway: otherwise its compiler turns the pages, and turns them back at every step.
    """
    width = config.cache_width
    if width > LANES and (backend or jax.default_backend()) == "tpu":
        width += -width % LANES
    return config.num_hidden_layers + mtp, width
