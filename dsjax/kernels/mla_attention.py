"""Causal attention of multi-head latent attention, rotary and no-rope halves apart.

    score_hij = (q_nope_hi . k_nope_hj + q_rope_hi . k_rope_j) * scale

DeepSeek-V2 (arXiv:2405.04434) section 2.1: one rotated key serves all heads. Arrays are flat, the
heads of a token one after the other, as products with weights give and take them.

On a TPU kernels multiply the halves where they are (`mla_attention_forward_tpu` and
`mla_attention_backward_tpu`). Elsewhere, where XLA's partitioner splits the program, and where
heads are not whole lanes wide, halves are joined and `attention` does it.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsjax.kernels import attention
from dsjax.kernels.attention_blocks import heads_first, pad_ids
from dsjax.kernels.mla_attention_backward_tpu import backward as backward_on_tpu
from dsjax.kernels.mla_attention_blocks_tpu import Attending, Heads
from dsjax.kernels.mla_attention_forward_tpu import forward as forward_on_tpu
from dsjax.kernels.tpu_core import alone
from sharding.platform import by_platform


def mla_attention_reference(
    attending: Attending, heads: int, scale: float
) -> Float[Array, "B S HV"]:
    """The meaning of `mla_attention`, with the whole score matrix."""
    joined = _joined(attending, heads)
    out = attention.causal_attention_reference(*joined, attending.segment_ids, scale)
    return out.reshape(attending.v.shape)


class _Saved(NamedTuple):
    """What the backward pass needs."""

    attending: Attending
    out: Float[Array, "B S HV"]
    log_sum: Float[Array, "B H S"]
    """Log-sum-exp of every query's scores."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def mla_attention(attending: Attending, heads: int, scale: float) -> Float[Array, "B S HV"]:
    """Attend to the earlier tokens of the same segment, and to oneself."""
    return _forward(attending, heads, scale)[0]


def _forward(attending: Attending, heads: int, scale: float) -> tuple[Array, _Saved]:
    here = partial(_forward_joined, heads=heads, scale=scale)
    if _has_kernel(attending, heads):
        kernel = partial(forward_on_tpu, heads=heads, scale=scale)
        out, log_sum = by_platform(attending, tpu=kernel, default=here)
    else:
        out, log_sum = here(attending)
    return out, _Saved(attending, out, log_sum)


def _backward(
    heads: int, scale: float, saved: _Saved, d_out: Array
) -> tuple[tuple[Array | None, ...]]:
    here = partial(_backward_joined, heads=heads, scale=scale)
    if _has_kernel(saved.attending, heads):
        kernel = partial(backward_on_tpu, heads=heads, scale=scale)
        gradients = by_platform(*saved, d_out, tpu=kernel, default=here)
    else:
        gradients = here(*saved, d_out)
    return (Attending(*gradients, segment_ids=None),)  # pyright: ignore[reportArgumentType]


mla_attention.defvjp(_forward, _backward)


def _has_kernel(attending: Attending, heads: int) -> bool:
    return alone() and Heads.of(attending, heads).together > 0


def _joined(attending: Attending, heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values [B, S, H, .], both halves in one."""
    rows, places = attending.v.shape[:2]
    q_nope, q_rope, k_nope, v = (
        x.reshape(rows, places, heads, -1)
        for x in (attending.q_nope, attending.q_rope, attending.k_nope, attending.v)
    )
    k_rope = jnp.broadcast_to(attending.k_rope[:, :, None], q_rope.shape)
    q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([k_nope, k_rope], -1)
    return q, k, v


def _forward_joined(attending: Attending, heads: int, scale: float) -> tuple[Array, Array]:
    q, k, v = map(heads_first, _joined(attending, heads))
    out, saved = attention.forward(q, k, v, pad_ids(attending.segment_ids), scale)
    places = attending.v.shape[1]
    out = out[:, :, :places].swapaxes(1, 2).reshape(attending.v.shape)
    return out, saved.log_sum[:, :, :places]


def _backward_joined(
    attending: Attending, out: Array, log_sum: Array, d_out: Array, heads: int, scale: float
) -> tuple[Array, ...]:
    *apart, ids = attending

    def joined(*apart: Array) -> tuple[Array, ...]:
        return tuple(map(heads_first, _joined(Attending(*apart, segment_ids=ids), heads)))

    (q, k, v), apart_again = jax.vjp(joined, *apart)
    rows, places = ids.shape
    out, d_out = (heads_first(x.reshape(rows, places, heads, -1)) for x in (out, d_out))
    log_sum = heads_first(log_sum.swapaxes(1, 2))
    saved = attention.Saved(q, k, v, pad_ids(ids), out, log_sum)
    return apart_again(attention.backward(scale, saved, d_out)[:3])
