"""Multi-head latent attention: keys and values of all heads come from one small latent.

DeepSeek-V2 (arXiv:2405.04434) section 2.1, DeepSeek-V3 (arXiv:2412.19437) section 2.1.1. One set
of weights has two faces:

    expanded   keys and values are made for every head; training and prefill
    absorbed   queries are brought into the latent space instead, and attention runs over the
               cached latents themselves; decode

The cache holds kv_lora_rank + qk_rope_head_dim numbers a token a layer, nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import ModelConfig
from dsjax.kernels.attention import causal_attention, masked_softmax
from dsjax.model.layers import Linear, RMSNorm, use
from dsjax.model.rope import rotate, softmax_scale
from sharding.rules import constrain

LATENT_NORM_EPS = 1e-6
"""The two latent norms use this whatever `rms_norm_eps` says (Moonlight's is 1e-5)."""

RotaryTable = tuple[Float[Array, "B S P"], Float[Array, "B S P"]]


class Latent(NamedTuple):
    """What attention remembers of tokens: normalized latents and rotated shared keys."""

    c_kv: Float[Array, "*L B S R"]
    k_rope: Float[Array, "*L B S P"]


class MLA(nnx.Module):
    """Multi-head latent attention, with a low-rank query when `q_lora_rank` is set.

        c_q = norm(x Wq_a);  q = c_q Wq_b              (q = x Wq without q_lora_rank)
        c_kv, k_rope = split(x Wkv_a);  c_kv = norm(c_kv)
        k_nope, v = split(c_kv Wkv_b)                  per head, k_nope first
        score = (q_nope . k_nope + rope(q_rope) . rope(k_rope)) * scale
        out = concat_heads(softmax(score) v) Wo

    Differs from the paper: nothing; the scale carries YaRN's m squared, as in the released code.
    """

    def __init__(self, config: ModelConfig, key: Array, dtype: jnp.dtype):
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
        segment_ids: Int[Array, "B S"] | None,
    ) -> tuple[Float[Array, "B S D"], Latent]:
        """Causal attention among the tokens of x; also returns what a cache would keep of them."""
        latent = self._latent(x, table)
        key_value = constrain(self.kv_b(latent.c_kv), "batch", "sequence", "heads", None)
        k_nope, v = jnp.split(key_value, [self.config.qk_nope_head_dim], axis=-1)
        # The rotary key is one for all heads.
        k_rope = latent.k_rope[:, :, None]
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:3], k_rope.shape[-1]))
        q = jnp.concatenate(self._queries(x, table), axis=-1)
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        heads = causal_attention(q, k, v, ids, softmax_scale(self.config))
        return self.out(heads), latent

    def absorbed(
        self,
        x: Float[Array, "B S D"],
        table: RotaryTable,
        cache: Latent,
        cached: Bool[Array, "B C"],
    ) -> tuple[Float[Array, "B S D"], Latent]:
        """Attention of new tokens over a cache and, causally, over themselves.

        `cached` marks which of the C entries of the cache are filled. Returns the output and the
        new tokens' latents, which the caller writes into the cache.
        """
        q_nope, q_rope = self._queries(x, table)
        new = self._latent(x, table)
        w_k, w_v = jnp.split(use(self.kv_b.weight, x.dtype), [self.config.qk_nope_head_dim], axis=1)
        q_latent = jnp.einsum("bqhn,hnr->bqhr", q_nope, w_k)

        def scores(latent: Latent) -> Array:
            c_kv, k_rope = (part.astype(x.dtype) for part in latent)
            s = jnp.einsum("bqhr,btr->bhqt", q_latent, c_kv, preferred_element_type=jnp.float32)
            return s + jnp.einsum(
                "bqhp,btp->bhqt", q_rope, k_rope, preferred_element_type=jnp.float32
            )

        tokens = x.shape[1]
        past = jnp.broadcast_to(cached[:, None], (x.shape[0], tokens, cached.shape[1]))
        causal = jnp.broadcast_to(jnp.tri(tokens, dtype=bool)[None], (x.shape[0], tokens, tokens))
        allowed = jnp.concatenate([past, causal], axis=-1)[:, None]
        both = jnp.concatenate([scores(cache), scores(new)], axis=-1)
        weights = masked_softmax(both * softmax_scale(self.config), allowed).astype(x.dtype)
        w_past, w_new = jnp.split(weights, [cached.shape[1]], axis=-1)
        heads_latent = jnp.einsum("bhqt,btr->bqhr", w_past, cache.c_kv.astype(x.dtype))
        heads_latent += jnp.einsum("bhqt,btr->bqhr", w_new, new.c_kv)
        return self.out(jnp.einsum("bqhr,hvr->bqhv", heads_latent, w_v)), new

    def _queries(self, x: Array, table: RotaryTable) -> tuple[Array, Array]:
        """No-rope and rotated halves, [B, S, H, nope] and [B, S, H, rope]."""
        if self.config.q_lora_rank is None:
            q = self.q(x)
        else:
            q = self.q_b(self.q_a_norm(self.q_a(x)))
        q = constrain(q, "batch", "sequence", "heads", None)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, rotate(q_rope, table)

    def _latent(self, x: Array, table: RotaryTable) -> Latent:
        c_kv, k_rope = jnp.split(self.kv_a(x), [self.config.kv_lora_rank], axis=-1)
        return Latent(self.kv_a_norm(c_kv), rotate(k_rope, table))
