"""Multi-token prediction: small modules after the main model that look further ahead.

DeepSeek-V3 (arXiv:2412.19437) section 2.2. Depth k sees the main model's hidden state and the
token k places on, and predicts the token after that. Embedding and head are the main model's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.kernels.paged_attention import Places
from dsjax.model.block import Block
from dsjax.model.layers import Linear, RMSNorm
from dsjax.model.moe import Routing
from dsjax.model.rope import RotaryTable
from sharding.rules import constrain


class MTPModule(nnx.Module):
    """One depth.

        h'_i = eh_proj(concat[enorm(Emb(t_{i+k})), hnorm(h_i^{k-1})])        embedding first
        h_i^k = Block(h'_i);   logits_i = Head(norm(h_i^k)) predict t_{i+k+1}

    Differs from the paper: equation 21 prints the two halves the other way round; the released
    weights want the embedding first. h^0 is the main model's output after its final norm, as the
    released layer is served.
    """

    def __init__(self, config: DeepSeekConfig, key: Array, dtype: jnp.dtype):
        proj, block = jax.random.split(key)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size, eps=eps, dtype=dtype)
        self.hnorm = RMSNorm(size, eps=eps, dtype=dtype)
        self.eh_proj = Linear(
            proj,
            {"latent": size},
            {"embed": 2 * size},
            std=config.initializer_range,
            dtype=dtype,
        )
        self.block = Block(config, block, dtype, moe=True)
        self.norm = RMSNorm(size, eps=eps, dtype=dtype)

    def __call__(
        self,
        embedded: Float[Array, "B S D"],
        hidden: Float[Array, "B S D"],
        table: RotaryTable,
        segment_ids: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """h^k before its norm, and where the expert layer sent its tokens."""
        x, routing = self.block(self._joined(embedded, hidden), table, segment_ids)
        assert routing is not None  # an MTP block always has experts
        return x, routing

    def extend(
        self,
        embedded: Float[Array, "B Q D"],
        hidden: Float[Array, "B Q D"],
        table: RotaryTable,
        pages: Float[Array, "G N T W"],
        places: Places,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "G N T W"]]:
        """h^k of new tokens, over pages of this module's own."""
        x, pages, _ = self.block.extend(self._joined(embedded, hidden), table, pages, places)
        return x, pages

    def _joined(self, embedded: Array, hidden: Array) -> Array:
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        return constrain(self.eh_proj(both), "batch", "sequence", "residual")


class Ahead(NamedTuple):
    """What the MTP modules make of a sequence; entry k - 1 belongs to depth k."""

    hidden: tuple[Float[Array, "B S D"], ...]
    """After the module's norm: ready for the head."""
    load: Float[Array, "M E"]
    balance_loss: Float[Array, "M"]


def make_mtp(config: ModelConfig, key: Array, dtype: jnp.dtype) -> MTPModule | None:
    """All depths as one module whose arrays have a leading axis; None for no depth."""
    if not isinstance(config, DeepSeekConfig) or config.num_nextn_predict_layers == 0:
        return None

    def one(key: Array) -> MTPModule:
        return MTPModule(config, key, dtype)

    return jax.vmap(one)(jax.random.split(key, config.num_nextn_predict_layers))


def shift(x: Shaped[Array, "B S"], by: int) -> Shaped[Array, "B S"]:
    """Bring x_{i+by} to place i; the last `by` places repeat the last token and mean nothing."""
    return jnp.concatenate([x[:, by:], jnp.repeat(x[:, -1:], by, axis=1)], axis=1)


def reaches(segment_ids: Int[Array, "B S"], by: int) -> Bool[Array, "B S"]:
    """Whether the token `by` places on exists and belongs to the same document."""
    inside = jnp.arange(segment_ids.shape[1]) < segment_ids.shape[1] - by
    same = (shift(segment_ids, by) == segment_ids) & (segment_ids > 0)
    return same & inside[None]
