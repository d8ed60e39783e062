"""Choose each row's next token from its logits, by the settings that `SamplerState` holds.

Every setting is an array with an entry for each row. A batch pays only for what some of its rows
ask for: when all are greedy, a step is one argmax. What a row gets never depends on its
neighbours: reductions are maxima, counts, and sums of integers, whose order does not matter.

There is no sort. The limit that top_k or top_p sets is found by bisection over the floats
themselves, so it is exact; tokens whose logits equal the limit are all kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsjax.inference.request import MAX_TOP_LOGPROBS
from dsjax.inference.sampler_state import HostOrDevice, SamplerState
from sharding.by_hand import summed

LOW_BITS = np.int32(2**31 - 1)
"""All but the sign."""


def sample(
    logits: Float[Array, "R V"], state: SamplerState, vocab_size: Int[Array, ""] | int
) -> Int[Array, "R"]:
    """Draw each row's next token from softmax(adjusted(logits)); greedy rows take the likeliest.

    By the Gumbel-max trick (Maddison et al., arXiv:1411.0030, section 2):

        argmax(z + g) ~ softmax(z)   with independent g = -log(-log(uniform))

    A row's noise depends on nothing but its seed and how many tokens it has made.

    Args:
        logits: of the model.
        state: of the rows, before this token.
        vocab_size: ids from here on are never chosen; a tokenizer can know fewer than the model.
    """
    changed = _changed(logits, state, vocab_size)

    def draw() -> Int[Array, "R"]:
        return _first_largest(_filtered(changed, state) + _noise(state, logits.shape[1]))

    return lax.cond((state.params.temperature > 0).any(), draw, lambda: _first_largest(changed))


def adjusted(
    logits: Float[Array, "R V"], state: SamplerState, vocab_size: Int[Array, ""] | int
) -> Float[Array, "R V"]:
    """Logits of the distribution that `sample` draws from: -inf for tokens that cannot come.

    The largest of a row is 0. Greedy rows hold 0 at the likeliest tokens and -inf elsewhere.
    """
    return _filtered(_changed(logits, state, vocab_size), state)


def logprobs(
    logits: Float[Array, "R V"], tokens: Int[Array, "R"], vocab_size: Int[Array, ""] | int
) -> tuple[Float[Array, "R"], Int[Array, "R N"], Float[Array, "R N"]]:
    """Log-probabilities by the model itself: of `tokens`, and of the N = min(20, V) likeliest.

    Ids from `vocab_size` on have no probability here either. They are rows of the head that were
    never trained to anything and can never come, so what remains is a distribution over tokens.

    Returns:
        Each token's log-probability; the ids of the likeliest, best first; theirs. Should fewer
        than N be known, the last are -inf.
    """
    known = _only_known(logits.astype(jnp.float32), vocab_size)
    total = jax.nn.logsumexp(known, axis=-1, keepdims=True)
    values, ids = lax.top_k(known, min(MAX_TOP_LOGPROBS, known.shape[1]))
    chosen = jnp.take_along_axis(known, tokens[:, None], axis=1)
    return (chosen - total)[:, 0], ids, values - total


# ---------------------------------------------------------------------------------------------
# Changes to single logits
# ---------------------------------------------------------------------------------------------


def _changed(
    logits: Float[Array, "R V"], state: SamplerState, vocab_size: Int[Array, ""] | int
) -> Float[Array, "R V"]:
    """Logits after bias and penalties, -inf where a token is forbidden."""
    p = state.params
    biased = (p.bias_values != 0).any(-1)
    penalized = (p.repetition_penalty != 1) | (p.frequency_penalty != 0) | (p.presence_penalty != 0)
    unstoppable = state.made < p.min_tokens

    def change(x: Float[Array, "R V"]) -> Float[Array, "R V"]:
        x = _if_any(biased, lambda x: _add_bias(x, state), x)
        x = _if_any(penalized, lambda x: _penalize(x, state), x)
        return _if_any(unstoppable, lambda x: _forbid_stops(x, state), x)

    x = _if_any(biased | penalized | unstoppable, change, logits.astype(jnp.float32))
    return _only_known(x, vocab_size)


def _if_any(rows: Bool[Array, "R"], change: Callable[[Array], Array], x: Array) -> Array:
    """`change`, which leaves the other rows as they are, unless there is no row for it."""
    return lax.cond(rows.any(), change, lambda x: x, x)


def _add_bias(x: Float[Array, "R V"], state: SamplerState) -> Float[Array, "R V"]:
    rows = jnp.arange(x.shape[0])[:, None]
    return x.at[rows, state.params.bias_ids].add(state.params.bias_values, mode="drop")


def _penalize(x: Float[Array, "R V"], state: SamplerState) -> Float[Array, "R V"]:
    """Repetition as in CTRL (arXiv:1909.05858, section 4.1), the other two as in OpenAI's API.

    Differs from CTRL: negative logits are multiplied, since division would make them likelier.
    """
    p = state.params
    made = state.counts > 0
    repetition = p.repetition_penalty[:, None]
    x = jnp.where(state.in_prompt | made, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - p.frequency_penalty[:, None] * state.counts.astype(jnp.float32)
    return x - p.presence_penalty[:, None] * made.astype(jnp.float32)


def _forbid_stops(x: Float[Array, "R V"], state: SamplerState) -> Float[Array, "R V"]:
    """-inf for the stop tokens of rows that have not made their least number of tokens."""
    rows = jnp.arange(x.shape[0])[:, None]
    limit = jnp.where(state.made < state.params.min_tokens, -jnp.inf, jnp.inf)
    return x.at[rows, state.params.stop_ids].min(limit[:, None], mode="drop")


def _only_known(x: Float[Array, "R V"], vocab_size: Int[Array, ""] | int) -> Float[Array, "R V"]:
    return jnp.where(_ids(x) < vocab_size, x, -jnp.inf)


def _ids(x: Float[Array, "R V"]) -> Int[Array, "R V"]:
    return lax.broadcasted_iota(jnp.int32, x.shape, 1)


# ---------------------------------------------------------------------------------------------
# Which tokens are left
# ---------------------------------------------------------------------------------------------


def _filtered(x: Float[Array, "R V"], state: SamplerState) -> Float[Array, "R V"]:
    """After temperature, top_k, top_p and min_p, less the row's maximum.

    top_k is Fan et al. (arXiv:1805.04833, section 5), top_p Holtzman et al. (arXiv:1904.09751,
    section 3.1), min_p Nguyen et al. (arXiv:2407.01082, section 3.1). Limits of the first two are
    compared with logits before temperature: the order is the same, and no rounding makes ties.
    """
    p = state.params
    drawn = p.temperature > 0
    # The maximum goes first: divided by a small temperature, it would overflow.
    z = (x - x.max(-1, keepdims=True)) / jnp.where(drawn, p.temperature, 1)[:, None]
    limit = kept_from(x, z, jnp.where(drawn, p.top_k, 0), jnp.where(drawn, p.top_p, 1))
    # A probability is min_p of the largest where z = log(min_p). A greedy row has a min_p of 1,
    # and keeps its maximum even on a backend whose log(1) is a little above 0.
    least = jnp.minimum(jnp.log(jnp.where(drawn, p.min_p, 1)), 0)
    return jnp.where((x >= limit[:, None]) & (z >= least[:, None]), z, -jnp.inf)


def kept_from(
    x: Float[Array, "R V"],
    z: Float[Array, "R V"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
) -> Float[Array, "R"]:
    """The smallest logit of each row that top_k, and top_p after it, leave.

    By hand, a device may have some of the vocabulary only; every device finds the same.

    Args:
        x: logits.
        z: the same over the temperature, less any number that is not far from the row's maximum.
        top_k: 0 for all.
        top_p: 1 for all.
    """
    return _top_p_limit(x, z, _top_k_limit(x, top_k), top_p)


def _top_k_limit(x: Float[Array, "R V"], top_k: Int[Array, "R"]) -> Float[Array, "R"]:
    """The k-th largest of each row; -inf for 0."""
    rows = top_k > 0
    nothing = jnp.full(rows.shape, -jnp.inf)
    return lax.cond(
        rows.any(), lambda: jnp.where(rows, _limit(x, 1, top_k), -jnp.inf), lambda: nothing
    )


def _top_p_limit(
    x: Float[Array, "R V"],
    z: Float[Array, "R V"],
    limit: Float[Array, "R"],
    top_p: Float[Array, "R"],
) -> Float[Array, "R"]:
    """The logit that must be reached in a row; `limit` is what top_k asks for."""
    rows = top_p < 1

    def search() -> Float[Array, "R"]:
        shares = _shares(jnp.where(x >= limit[:, None], z, -jnp.inf))
        # At least one share, so that the smallest top_p still keeps the likeliest token.
        total = summed(shares.sum(-1), "vocab")
        wanted = jnp.maximum((top_p * total.astype(jnp.float32)).astype(jnp.int32), 1)
        return jnp.where(rows, jnp.maximum(limit, _limit(x, shares, wanted)), limit)

    return lax.cond(rows.any(), search, lambda: limit)


def _limit(
    x: Float[Array, "R V"], shares: Int[Array, "R V"] | int, wanted: Int[Array, "R"]
) -> Float[Array, "R"]:
    """The largest float in each row such that tokens from it on have `wanted` shares together.

    Floats read as integers keep their order, and there are fewer than 2^32 of them between -inf
    and inf: after 32 halvings one is left. -inf where not even all tokens have so many.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their sum could overflow
        among = x >= _as_float(middle)[:, None]
        found = summed(jnp.where(among, shares, 0).sum(-1, dtype=jnp.int32), "vocab")
        enough = found >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = (jnp.full(wanted.shape, _as_integer(end)) for end in (-np.inf, np.inf))
    return _as_float(lax.fori_loop(0, 32, halve, (low, high))[0])


def _as_float(number: Int[Array, "R"]) -> Float[Array, "R"]:
    """The inverse of `_as_integer`."""
    return lax.bitcast_convert_type(number ^ ((number >> 31) & LOW_BITS), jnp.float32)


def _as_integer(x: float) -> np.int32:
    """A float32's bits as an int32 that is in the same order; below zero the bits run backwards."""
    bits = np.float32(x).view(np.int32)
    return bits ^ ((bits >> 31) & LOW_BITS)


def _shares(z: Float[Array, "R V"]) -> Int[Array, "R V"]:
    """softmax(z) as integers that sum to about 2^30.

    Integers have the same sum in every order. Floats do not, and the order may depend on the shape
    of the batch. A share is 1e-9, which for a large vocabulary is what float32 sums are off by.
    """
    weights = jnp.exp(z)
    # 2^19 weights of 24 bits overflow an int32, so the sums of their halves are made apart.
    parts = (weights * 2**24).astype(jnp.int32)
    halves = (summed(half.sum(-1), "vocab") for half in (parts >> 12, parts & 4095))
    high, low = (half.astype(jnp.float32) for half in halves)
    scale = 2.0**54 / (high * 2**12 + low)
    return (weights * scale[:, None] + 0.5).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------
# The draw
# ---------------------------------------------------------------------------------------------


def _noise(state: SamplerState, vocab: int) -> Float[Array, "R V"]:
    """Gumbel noise by seed and number of tokens made; 0 for greedy rows.

    `jax.random.gumbel` has no value above 16: tokens of probability 1e-7 would come half as
    often as they should. Here all 31 bits count where the noise is large, up to 22.
    """

    def of_row(seed: HostOrDevice, made: Array) -> Array:
        # By name: another default generator would give other tokens, or depend on the batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), made)
        return jax.random.bits(key, (vocab,), jnp.uint32)

    bits = jax.vmap(of_row)(state.params.seed, state.made) >> 1
    uniform = (bits.astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-31
    uniform = jnp.minimum(uniform, 1 - 2.0**-24)  # rounded up to 1, it would give -inf
    gumbel = -jnp.log(-jnp.log1p(-uniform))
    return jnp.where((state.params.temperature > 0)[:, None], gumbel, 0)


def _first_largest(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """argmax, several times as fast on a CPU, where XLA's does one comparison at a time."""
    largest = x == x.max(-1, keepdims=True)
    nowhere = x.shape[1]
    # A row with NaN has no largest, and gets token 0.
    return jnp.where(largest, _ids(x), nowhere).min(-1) % nowhere
