"""The model: embedding, dense layers, expert layers, norm, head, and the MTP modules.

Forward is pure. Layers of one kind are stacked and scanned, so compile time does not grow with
depth. Expert loads are results, never hidden state. `decoder.py` is the same model over a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.architecture import ModelConfig
from dsjax.kernels import experts_parallel
from dsjax.model.block import ATTENDED, Block, make_stack
from dsjax.model.layers import Embedding, Linear, RMSNorm, use
from dsjax.model.moe import CHOSEN, LOGITS, ExpertStats, expert_stats
from dsjax.model.mtp import Ahead, make_mtp, reaches, shift
from dsjax.model.rope import rotary_table
from sharding.by_hand import is_gathering, sequence_part
from sharding.rules import constrain

Remat = Literal[
    "keep_all",
    "keep_matmuls",
    "keep_attention",
    "keep_layer_inputs",
    "keep_layer_inputs_on_host",
]
"""What the backward pass finds in memory, the device's or the host's, and the choice of
experts always; what is not there is computed again, and gathered weights are gathered again."""

_LAYER_INPUT = "layer_input"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["model", "tokens", "positions", "segment_ids", "hidden", "load", "balance_loss"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass gives; logits are made only when asked for."""

    model: Transformer
    tokens: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    hidden: Float[Array, "B P D"]
    """After the final norm. P is S, or by hand this device's part of it; integers are whole, so
    that a place can look at one that lies elsewhere."""
    load: Float[Array, "L E"]
    """(token, choice) pairs that each expert layer sent to each expert; padding not counted."""
    balance_loss: Float[Array, "L"]
    """Sequence-wise balance loss of each expert layer, summed over rows, without alpha."""

    @property
    def logits(self) -> Float[Array, "B S V"]:
        """float32; position i predicts token i + 1."""
        return self.model.logits(self.hidden)

    @property
    def mtp_logits(self) -> tuple[Float[Array, "B S V"], ...]:
        """One per MTP depth k, float32: position i predicts token i + 1 + k; the last are void."""
        return tuple(self.model.logits(hidden) for hidden in self.model.look_ahead(self).hidden)


class Transformer(nnx.Module):
    """DeepSeek-V3, and by configuration V2, Moonlight, Kimi-K2, and the dense families.

    `dense_layers` (the first `first_k_dense_replace`), `moe_layers` and `mtp` are stacks: every
    array in them has a leading axis. A stack without layers is None.

    Args:
        config: the architecture.
        key: `jax.random.key` for the initial values.
        param_dtype: what the weights are stored in.
        dtype: what activations are computed in; None means as stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        key: Array,
        *,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
    ):
        c = config
        keys = jax.random.split(key, 5)
        stored = jnp.dtype(param_dtype)
        std = c.initializer_range
        embed_std = c.embedding_initializer_range or std
        self.embed = Embedding(keys[0], c.vocab_size, c.hidden_size, std=embed_std, dtype=stored)
        self.dense_layers = make_stack(c, keys[1], stored, c.first_k_dense_replace, moe=False)
        self.moe_layers = make_stack(c, keys[2], stored, c.num_moe_layers, moe=True)
        self.norm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps, dtype=stored)
        vocab, embed = {"vocab": c.vocab_size}, {"embed": c.hidden_size}
        tied = c.tie_word_embeddings
        self.head = None if tied else Linear(keys[3], vocab, embed, std=std, dtype=stored)
        self.mtp = make_mtp(c, keys[4], stored)
        self.config = c
        self.dtype = stored if dtype is None else jnp.dtype(dtype)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        *,
        experts: Int[Array, "B S L K"] | None = None,
        remat: Remat = "keep_all",
    ) -> Output:
        """Run the main model.

        Args:
            tokens: ids below `vocab_size`.
            positions: place of each token in its document; None counts from each segment's start.
            segment_ids: which document a token belongs to; attention stays within it. 0 is
                padding. None: every row is one document.
            experts: which experts each expert layer sends each token to, where the router's choice
                in another run is to be repeated; negative where it is free.
            remat: what the backward pass finds in memory.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = _positions(segment_ids)
        table = rotary_table(self.config, sequence_part(positions))
        mine = sequence_part(segment_ids)

        def layer(
            x: Array, block_and_given: tuple[Block, Array | None]
        ) -> tuple[Array, ExpertStats | None]:
            block, given = block_and_given
            x = checkpoint_name(x, _LAYER_INPUT)
            x, routing = block(x, table, mine, given)
            stats = None if routing is None else expert_stats(routing, mine > 0)
            return x, stats

        layer = rematerialize(layer, remat)
        x = self._embed(sequence_part(tokens))
        stats: Any = _no_stats(self.config)
        if self.dense_layers is not None:
            x, _ = jax.lax.scan(layer, x, (self.dense_layers, None))
        if self.moe_layers is not None:
            given = None if experts is None else jnp.moveaxis(sequence_part(experts), 2, 0)
            x, stats = jax.lax.scan(layer, x, (self.moe_layers, given))
        return Output(self, tokens, positions, segment_ids, self.norm(x), *stats)

    def look_ahead(self, out: Output, *, remat: Remat = "keep_all") -> Ahead:
        """Run the MTP modules over a finished forward pass; each depth feeds the next."""
        config = self.config
        table = rotary_table(config, sequence_part(out.positions))
        mine = sequence_part(out.segment_ids)

        def depth(module: Any, hidden: Array, by: int) -> tuple[Array, Array, ExpertStats]:
            hidden = checkpoint_name(hidden, _LAYER_INPUT)
            embedded = self._embed(sequence_part(shift(out.tokens, by)))
            hidden, routing = module(embedded, hidden, table, mine)
            # The last place with a target sees token i + by and predicts the one after it.
            stats = expert_stats(routing, sequence_part(reaches(out.segment_ids, by)))
            return hidden, module.norm(hidden), stats

        hidden, normed, stats = out.hidden, [], []
        for by in range(1, config.num_nextn_predict_layers + 1):
            module = jax.tree.map(lambda array, k=by - 1: array[k], self.mtp)
            run = rematerialize(partial(depth, by=by), remat)
            hidden, ready, stat = run(module, hidden)
            normed.append(ready)
            stats.append(stat)
        if not stats:
            return Ahead((), *_no_stats(config))
        return Ahead(tuple(normed), *(jnp.stack(parts) for parts in zip(*stats, strict=True)))

    def logits(self, hidden: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """float32 scores of every token of the vocabulary."""
        weight = self.head_weight(hidden.dtype)
        logits = jnp.einsum("bsd,vd->bsv", hidden, weight, preferred_element_type=jnp.float32)
        return constrain(logits, "batch", "sequence", "vocab")

    def head_weight(self, dtype: Any) -> Float[Array, "V D"]:
        """The matrix that makes logits: the head's, or the embedding's where the two are tied."""
        return use((self.embed if self.head is None else self.head).weight, dtype)

    def _embed(self, tokens: Array) -> Array:
        return constrain(self.embed(tokens, self.dtype), "batch", "sequence", "residual")


def rematerialize(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The same function, whose backward pass recomputes what `remat` does not keep."""
    if remat == "keep_all" and not is_gathering():
        return function
    ready_made = jax.checkpoint_policies
    small = experts_parallel.KEPT, CHOSEN
    policies = {
        "keep_all": _all_but_gathered_weights,
        "keep_matmuls": ready_made.save_from_both_policies(
            ready_made.dots_with_no_batch_dims_saveable, ready_made.save_only_these_names(*small)
        ),
        "keep_attention": ready_made.save_only_these_names(_LAYER_INPUT, ATTENDED, LOGITS, *small),
        "keep_layer_inputs": ready_made.save_only_these_names(_LAYER_INPUT, *small),
        "keep_layer_inputs_on_host": ready_made.save_and_offload_only_these_names(
            names_which_can_be_saved=[*small],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(function, policy=policies[remat])


def _all_but_gathered_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Kept for every layer, gathered weights would be the whole model on every device."""
    return primitive.name != "all_gather"


def _positions(segment_ids: Array) -> Array:
    """Place of each token within its own run of one segment id."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def _no_stats(config: ModelConfig) -> ExpertStats:
    return ExpertStats(jnp.zeros((0, config.n_routed_experts)), jnp.zeros(0))
