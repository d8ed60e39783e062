"""One transformer layer, dense or with experts, in its two ways of running."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.kernels.paged_attention import Places
from dsjax.model.gqa import GQA
from dsjax.model.layers import MLP, RMSNorm
from dsjax.model.mla import MLA
from dsjax.model.moe import MoE, Routing
from dsjax.model.rope import RotaryTable
from sharding.rules import constrain

ATTENDED = "attended"
"""The name of hidden states between attention and feed-forward, for who keeps them."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, key: Array, dtype: jnp.dtype, *, moe: bool):
        attn, ffn = jax.random.split(key)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attn_norm = RMSNorm(size, eps=eps, dtype=dtype)
        if isinstance(config, DeepSeekConfig):
            self.attn: MLA | GQA = MLA(config, attn, dtype)
        else:
            self.attn = GQA(config, attn, dtype)
        self.ffn_norm = RMSNorm(size, eps=eps, dtype=dtype)
        if moe:
            assert isinstance(config, DeepSeekConfig)  # the dense families have no such layer
            self.ffn: MoE | MLP = MoE(config, ffn, dtype)
        else:
            std = config.initializer_range
            self.ffn = MLP(ffn, size, config.intermediate_size, std=std, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        table: RotaryTable,
        segment_ids: Int[Array, "B S"],
        given: Int[Array, "B S K"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        """Whole sequences, for training; `Routing` is None for a dense layer.

        `given` are experts that tokens go to, whatever the router prefers.
        """
        attended = self.attn.expanded(self.attn_norm(x), table, segment_ids)
        return self._feed_forward(checkpoint_name(x + attended, ATTENDED), given)

    def extend(
        self,
        x: Float[Array, "B Q D"],
        table: RotaryTable,
        pages: Float[Array, "G N T W"],
        places: Places,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "G N T W"], Routing | None]:
        """New tokens over the pages of their rows; returns the pages with them in."""
        attended, pages = self.attn.extend(self.attn_norm(x), table, pages, places)
        x, routing = self._feed_forward(x + attended)
        return x, pages, routing

    def _feed_forward(self, x: Array, given: Array | None = None) -> tuple[Array, Routing | None]:
        x = constrain(x, "batch", "sequence", "residual")
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            y, routing = self.ffn(normed, given)
        else:
            y, routing = self.ffn(normed), None
        return constrain(x + y, "batch", "sequence", "residual"), routing


def make_stack(
    config: ModelConfig, key: Array, dtype: jnp.dtype, count: int, *, moe: bool
) -> Block | None:
    """`count` blocks as one, every array with a leading axis, ready to be scanned; None for 0."""
    if count == 0:
        return None

    def one(key: Array) -> Block:
        return Block(config, key, dtype, moe=moe)

    return jax.vmap(one)(jax.random.split(key, count))
