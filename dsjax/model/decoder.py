"""The same model over a cache: layers apart instead of stacked, every weight as decoding reads it.

Training scans over stacks of layers; there the slice of a stack is nothing beside the work on it.
Decoding a few tokens does little but read weights: so here every layer has arrays of its own, and
matrices lie with their inputs first. The modules are those of training.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.architecture import ModelConfig
from dsjax.kernels.paged_attention import Places
from dsjax.model.block import Block
from dsjax.model.layers import Embedding, Linear, RMSNorm, scale_of
from dsjax.model.mla import MLA
from dsjax.model.moe import Experts
from dsjax.model.mtp import MTPModule
from dsjax.model.rope import rotary_table
from dsjax.model.transformer import Transformer
from sharding.rules import constrain

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
    head: Float[Array, "D V"]
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
        assert self.mtp is not None  # the engine does not ask a model without
        table = rotary_table(self.config, places.positions)
        embedded = self._embed(next_tokens)
        hidden, last = self.mtp.extend(embedded, hidden, table, pages[-1], places)
        return self.mtp.norm(hidden), (*pages[:-1], last)

    def logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """float32 scores of every token of the vocabulary."""
        logits = jnp.einsum("bd,dv->bv", hidden, self.head, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "vocab")

    def _embed(self, tokens: Array) -> Array:
        return constrain(self.embed(tokens, self.dtype), "batch", "sequence", "residual")


@jax.jit
def take_apart(model: Transformer) -> Decoder:
    """A decoder with copies of a model's weights.

    Matrices are in the dtype that the model computes in, so that no step casts them; norms and
    routers, which compute in float32, stay as they are, and so does what is in FP8.
    """
    config = model.config
    layers = [
        jax.tree.map(lambda a, i=i: a[i], stack)
        for stack, count in (
            (model.dense_layers, config.first_k_dense_replace),
            (model.moe_layers, config.num_moe_layers),
        )
        for i in range(count)
    ]
    mtp = jax.tree.map(lambda a: a[0], model.mtp)
    embed = jax.tree.map(lambda a: a, model.embed)
    head = model.head_weight(model.dtype).T
    for module in (embed, *layers, mtp):
        _prepare(module, model.dtype)
    return Decoder(embed, tuple(layers), model.norm, head, mtp, config, model.dtype)


def _prepare(module: nnx.Module | None, dtype: Any) -> None:
    """Cast every matrix below, put its inputs first, and hold what is cut at every step apart.

    What is in FP8 stays so.
    """
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


def _modules(module: nnx.Module | None) -> list[Any]:
    return [] if module is None else [node for _, node in nnx.iter_graph(module)]


def make_pages(
    config: ModelConfig, groups: int, count: int, size: int, dtype: Any, *, mtp: bool
) -> Pages:
    """Empty pages: `count` of `size` tokens in each group, for every layer."""
    layers, width = cache_shape(config, mtp=mtp)
    return tuple(jnp.zeros((groups, count, size, width), dtype) for _ in range(layers))


def cache_shape(config: ModelConfig, *, mtp: bool) -> tuple[int, int]:
    """Layers that remember, MTP's among them if it is used, and numbers a token in each."""
    return config.num_hidden_layers + mtp, config.cache_width
