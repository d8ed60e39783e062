"""Multi-head latent attention: keys and values of all heads come from one small latent.

DeepSeek-V2 (arXiv:2405.04434) section 2.1, DeepSeek-V3 (arXiv:2412.19437) section 2.1.1. One set
of weights has two faces:

    expanded   keys and values are made for every head; training and prefill
    absorbed   queries are brought into the latent space instead, and attention runs over the
               cached latents themselves; decode

The cache holds kv_lora_rank + qk_rope_head_dim numbers a token a layer, nothing more.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.architecture import DeepSeekConfig
from dsjax.kernels.mla_attention import Attending, mla_attention
from dsjax.kernels.paged_attention import (
    Places,
    latent_attention,
    paged_attention,
    write_pages,
)
from dsjax.kernels.ring_attention import ring_attention
from dsjax.kernels.rotary import rotate_flat
from dsjax.model.layers import Linear, RMSNorm, use
from dsjax.model.rope import RotaryTable, rotate_pairs, softmax_scale
from sharding.by_hand import summed, travel_axis
from sharding.rules import constrain

LATENT_NORM_EPS = 1e-6
"""The two latent norms use this whatever `rms_norm_eps` says (Moonlight's is 1e-5)."""


class MLA(nnx.Module):
    """Multi-head latent attention, with a low-rank query when `q_lora_rank` is set.

        c_q = norm(x Wq_a);  q = c_q Wq_b              (q = x Wq without q_lora_rank)
        c_kv, k_rope = split(x Wkv_a);  c_kv = norm(c_kv)
        k_nope, v = split(c_kv Wkv_b)                  per head, k_nope first
        score = (q_nope . k_nope + rope(q_rope) . rope(k_rope)) * scale
        out = concat_heads(softmax(score) v) Wo

    Differs from the paper: nothing; the scale carries YaRN's m squared, as in the released code.
    """

    def __init__(self, config: DeepSeekConfig, key: Array, dtype: jnp.dtype):
        c = config
        keys = jax.random.split(key, 5)
        std = c.initializer_range
        heads, embed, latent = (
            {"heads": c.num_attention_heads},
            {"embed": c.hidden_size},
            {"kv_lora": c.kv_lora_rank},
        )
        query = heads | {"head_dim": c.qk_head_dim}
        if c.q_lora_rank is None:
            self.q = Linear(keys[0], query, embed, std=std, dtype=dtype)
        else:
            low = {"q_lora": c.q_lora_rank}
            self.q_a = Linear(keys[0], {"latent": c.q_lora_rank}, embed, std=std, dtype=dtype)
            self.q_a_norm = RMSNorm(c.q_lora_rank, eps=LATENT_NORM_EPS, dtype=dtype)
            self.q_b = Linear(keys[1], query, low, std=std, dtype=dtype)
        cached = {"latent": c.kv_lora_rank + c.qk_rope_head_dim}
        self.kv_a = Linear(keys[2], cached, embed, std=std, dtype=dtype)
        self.kv_a_norm = RMSNorm(c.kv_lora_rank, eps=LATENT_NORM_EPS, dtype=dtype)
        key_value = heads | {"head_dim": c.qk_nope_head_dim + c.v_head_dim}
        self.kv_b = Linear(keys[3], key_value, latent, std=std, dtype=dtype)
        values = heads | {"head_dim": c.v_head_dim}
        self.out = Linear(keys[4], embed, values, std=std, dtype=dtype)
        self.config = config

    def expanded(
        self,
        x: Float[Array, "B S D"],
        table: RotaryTable,
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S D"]:
        """Causal attention among the tokens of x; where a sequence is split, its latents travel."""
        c = self.config
        c_kv, k_rope = latent = self._latent(x, table)
        weight = self.kv_b.matrix(x.dtype)
        scale = softmax_scale(c)
        if (axis := travel_axis("sequence")) is not None:
            q = jnp.concatenate(self._queries(x, table), axis=-1)
            expand = partial(_expand, c.qk_nope_head_dim)
            heads: Array = ring_attention(axis, q, latent, segment_ids, weight, expand, scale)
            return self.out(heads)
        k_nope, v = (
            _of_all_heads(c_kv, part, self.kv_b)
            for part in (weight[:, : c.qk_nope_head_dim], weight[:, c.qk_nope_head_dim :])
        )
        attending = Attending(*self._flat_queries(x, table), k_nope, k_rope, v, segment_ids)
        flat: Array = mla_attention(attending, len(weight), scale)
        return self.out(flat.reshape(*x.shape[:2], len(weight), c.v_head_dim))

    def _flat_queries(self, x: Array, table: RotaryTable) -> tuple[Array, Array]:
        """No-rope and rotated halves of all heads, [B, S, H nope] and [B, S, H rope]."""
        nope = self.config.qk_nope_head_dim
        x, product = self._query_product(x)
        weight = product.matrix(x.dtype)
        # A weight is cut, which is small, and not what it makes of every token.
        rope = jnp.concatenate([weight[:, nope::2], weight[:, nope + 1 :: 2]], axis=1)
        q_nope, q_rope = (_of_all_heads(x, part, product) for part in (weight[:, :nope], rope))
        return q_nope, rotate_flat(q_rope, *table)

    def _query_product(self, x: Array) -> tuple[Array, Linear]:
        """What queries are made of, and by what."""
        if self.config.q_lora_rank is None:
            return x, self.q
        return self.q_a_norm(self.q_a(x)), self.q_b

    def extend(
        self,
        x: Float[Array, "B Q D"],
        table: RotaryTable,
        pages: Float[Array, "G N T W"],
        places: Places,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "G N T W"]]:
        """Attention of new tokens over their rows' pages, which they are written to first.

        Needs `split_keys_from_values`. Few queries are absorbed, many are worth expanding the keys.
        """
        c = self.config
        latent = jnp.concatenate(self._latent(x, table), axis=-1)
        pages = write_pages(pages, latent, places.slots)
        q_nope, q_rope = self._queries(x, table)
        w_k, w_v = (use(w, x.dtype) for w in (self.k_b, self.v_b))
        scale = softmax_scale(c)
        if x.shape[1] >= _queries_worth_expanding(c):
            q = jnp.concatenate([q_nope, q_rope], axis=-1)

            def expand(latent: Array) -> tuple[Array, Array]:
                c_kv, k_rope, _ = jnp.split(latent, [c.kv_lora_rank, c.cache_width], axis=-1)
                k_nope = jnp.einsum("btr,hnr->bthn", c_kv, w_k)
                return _with_shared(k_nope, k_rope), jnp.einsum("btr,hvr->bthv", c_kv, w_v)

            heads = paged_attention(q, pages, places, expand, len(w_k), c.v_head_dim, scale)
        else:
            q = jnp.concatenate([jnp.einsum("bqhn,hnr->bqhr", q_nope, w_k), q_rope], axis=-1)
            mixed = latent_attention(q, pages, places, c.kv_lora_rank, scale)
            heads = jnp.einsum("bqhr,hvr->bqhv", mixed, w_v)
        return self.out(heads), pages

    def split_keys_from_values(self, dtype: DTypeLike) -> None:
        """Hold `kv_b` as two weights, `k_b` [H, nope, R] and `v_b` [H, V, R]: none is cut later.

        In `dtype`, also where `kv_b` is in FP8: its blocks do not end where a head's keys do.
        """
        axes = self.kv_b.weight.get_metadata("axes")
        nope = self.config.qk_nope_head_dim
        both = self.kv_b.matrix(dtype)
        self.k_b = nnx.Param(both[:, :nope], axes=axes)
        self.v_b = nnx.Param(both[:, nope:], axes=axes)
        del self.kv_b

    def _queries(self, x: Array, table: RotaryTable) -> tuple[Array, Array]:
        """No-rope and rotated halves, [B, S, H, nope] and [B, S, H, rope]."""
        x, product = self._query_product(x)
        q = constrain(product(x), "batch", "sequence", "heads", None)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rotate_pairs(q_rope, table)

    def _latent(self, x: Array, table: RotaryTable) -> tuple[Array, Array]:
        """What attention remembers of tokens: c_kv after its norm, k_rope after its rotation."""
        c_kv, k_rope = jnp.split(self.kv_a(x), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_norm(c_kv), rotate_pairs(k_rope, table)


def _of_all_heads(
    x: Float[Array, "B S R"], weight: Float[Array, "H N R"], whole: Linear
) -> Float[Array, "B S HN"]:
    """x times a part of the matrix of `whole`, the heads of a token one after the other."""
    flat = jnp.einsum("bsr,nr->bsn", x, weight.reshape(-1, x.shape[-1]))
    return constrain(summed(flat, *whole.into), "batch", "sequence", "heads")


def _expand(
    nope: int, latent: tuple[Array, Array], weight: Float[Array, "H N R"]
) -> tuple[Array, Array]:
    """Keys [B, S, H, nope + rope] and values [B, S, H, V] of all heads, from what travels."""
    c_kv, k_rope = latent
    key_value = jnp.einsum("bsr,hnr->bshn", c_kv, weight)
    key_value = constrain(key_value, "batch", "sequence", "heads", None)
    k_nope, v = jnp.split(key_value, [nope], axis=-1)
    return _with_shared(k_nope, k_rope), v


def _with_shared(k_nope: Array, k_rope: Array) -> Array:
    """Keys of all heads [B, S, H, nope + rope]; the rotary half is one for all heads."""
    k_rope = k_rope[:, :, None]
    k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1)


def _queries_worth_expanding(config: DeepSeekConfig) -> int:
    """From how many queries on making keys and values costs less than queries in latent space.

    A key and its value take R (nope + v) products a head, once; each query then saves
    2 R - nope - v of them. 171 queries for V3.
    """
    apart, saved = config.qk_nope_head_dim + config.v_head_dim, 2 * config.kv_lora_rank
    return math.ceil(config.kv_lora_rank * apart / max(saved - apart, 1))
