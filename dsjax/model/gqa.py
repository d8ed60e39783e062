"""Grouped-query attention: several heads share a key and a value (arXiv:2305.13245).

What Llama, Qwen2 and Qwen3 attend by, and with them R1's distills. The cache holds the keys after
their rotation and the values of the heads that share them, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.architecture import DenseConfig
from dsjax.kernels.attention import causal_attention
from dsjax.kernels.paged_attention import Places, paged_attention, write_pages
from dsjax.kernels.ring_attention import ring_attention
from dsjax.model.layers import Linear, RMSNorm
from dsjax.model.rope import RotaryTable, rotate_halves, softmax_scale
from sharding.by_hand import first_place, is_split, travel_axis
from sharding.rules import constrain


class GQA(nnx.Module):
    """Grouped-query attention, with Qwen2's biases or Qwen3's norms where the family has them.

        q, k, v = x Wq + b_q,  x Wk + b_k,  x Wv + b_v           (b: Qwen2 only)
        q, k = rope(norm(q)), rope(norm(k))                      (norm over a head: Qwen3 only)
        out = concat_heads(softmax(q k^T * scale) v) Wo

    Differs from the paper: biases, norms and rotation are the families' own.
    """

    def __init__(self, config: DenseConfig, key: Array, dtype: jnp.dtype):
        c = config
        keys = jax.random.split(key, 4)
        std, bias, width = c.initializer_range, c.qkv_bias, {"head_dim": c.head_dim}
        embed, heads = {"embed": c.hidden_size}, {"heads": c.num_attention_heads} | width
        few = {"kv_heads": c.num_key_value_heads} | width
        self.q = Linear(keys[0], heads, embed, std=std, dtype=dtype, bias=bias)
        self.k = Linear(keys[1], few, embed, std=std, dtype=dtype, bias=bias)
        self.v = Linear(keys[2], few, embed, std=std, dtype=dtype, bias=bias)
        self.out = Linear(keys[3], embed, heads, std=std, dtype=dtype)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps, dtype=dtype)
        self.config = config

    def expanded(
        self,
        x: Float[Array, "B S D"],
        table: RotaryTable,
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Causal attention among the tokens of x."""
        q, *few = self._projected(x, table)
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        expand = partial(_of_queries, q.shape[2], shared)
        scale = softmax_scale(self.config)
        heads: Array
        if (axis := travel_axis("sequence")) is not None:
            heads = ring_attention(axis, q, tuple(few), segment_ids, (), expand, scale)
        else:
            heads = causal_attention(q, *expand(few, ()), segment_ids, scale)
        return self.out(heads)

    def extend(
        self,
        x: Float[Array, "B Q D"],
        table: RotaryTable,
        pages: Float[Array, "G N T W"],
        places: Places,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "G N T W"]]:
        """Attention of new tokens over their rows' pages, which they are written to first."""
        c = self.config
        q, k, v = self._projected(x, table)
        new = jnp.concatenate([k, v], axis=2).reshape(*x.shape[:2], -1)
        pages = write_pages(pages, new, places.slots)

        def split(cached: Array) -> tuple[Array, Array]:
            both = cached[..., : c.cache_width].reshape(
                *cached.shape[:2], 2, c.num_key_value_heads, c.head_dim
            )
            few = both[:, :, 0], both[:, :, 1]
            return _of_queries(q.shape[2], shared, few, ()) if is_split("heads") else few

        scale = softmax_scale(c)
        shared = c.num_attention_heads // c.num_key_value_heads
        key_heads = q.shape[2] if is_split("heads") else c.num_key_value_heads
        heads = paged_attention(q, pages, places, split, key_heads, c.head_dim, scale)
        return self.out(heads), pages

    def _projected(self, x: Array, table: RotaryTable) -> tuple[Array, Array, Array]:
        """Queries [B, S, H, K], keys and values [B, S, J, K] of J heads."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(q, "batch", "sequence", "heads", None)
        return rotate_halves(q, table), rotate_halves(k, table), v


def _of_queries(count: int, shared: int, few: Sequence[Array], _: tuple[()]) -> tuple[Array, Array]:
    """Keys and values [B, S, H, K] for each of this device's `count` query heads.

    A device that has some of the queries has all keys, and needs those of its own.
    """

    def mine(heads: Array) -> Array:
        of_all = jnp.repeat(heads, shared, axis=2)
        if is_split("heads"):
            first = first_place("heads", count)
            return jax.lax.dynamic_slice_in_dim(of_all, first, count, 2)
        return constrain(of_all, "batch", "sequence", "heads", None)

    k, v = map(mine, few)
    return k, v
