"""What the sampler knows of each row: a request's settings, and the tokens it has seen and made.

All of it is arrays on the device, one entry a row, so no setting and no prompt length ever compiles
anything: a row is given to a new request by writing into the arrays.

    state = SamplerState.empty(rows, vocab)
    state = set_row(state, row, row_params(request.sampling, eos))
    state = mark_prompt(state, row, chunk, len(chunk))     # as often as the prompt has chunks
    tokens = sample(logits, state, vocab_size)             # of sampling.py, for all rows at once
    state = record(state, tokens, active)

The functions are pure. Jit them with the state donated: then they write in place, while without
they copy two arrays of [rows, vocabulary].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsjax.architecture import MAX_EOS_TOKENS
from dsjax.inference.request import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams

NO_TOKEN = 2**31 - 1
"""Fills unused places of a list of ids. Beyond any vocabulary, so that a scatter drops it; -1 would
wrap around to the last token."""

LARGEST_INT = 2**31 - 1
COLDEST = 1e-30
"""Temperatures between 0 and this are this: what they divide by stays a normal float32."""

HostOrDevice = np.ndarray | Array


class RowParams(NamedTuple):
    """A request's settings as arrays: of one row on the host, of all R rows on the device.

    Their meaning is told in `SamplingParams`.
    """

    temperature: Float[HostOrDevice, "*R"]
    top_k: Int[HostOrDevice, "*R"]
    top_p: Float[HostOrDevice, "*R"]
    min_p: Float[HostOrDevice, "*R"]
    repetition_penalty: Float[HostOrDevice, "*R"]
    frequency_penalty: Float[HostOrDevice, "*R"]
    presence_penalty: Float[HostOrDevice, "*R"]
    seed: UInt32[HostOrDevice, "*R"]
    min_tokens: Int[HostOrDevice, "*R"]
    bias_ids: Int[HostOrDevice, "*R 300"]
    bias_values: Float[HostOrDevice, "*R 300"]
    stop_ids: Int[HostOrDevice, "*R 24"]
    """The model's eos are among them, unless the request ignores it."""


class SamplerState(NamedTuple):
    """The R rows of a running batch over a vocabulary of V tokens. A pytree of device arrays."""

    params: RowParams
    made: Int[Array, "R"]
    """Tokens made so far."""
    counts: Int[Array, "R V"]
    """How often each token is among them."""
    in_prompt: Bool[Array, "R V"]

    @classmethod
    def empty(cls, rows: int, vocab: int) -> SamplerState:
        """Rows without a request: greedy, and nothing seen."""
        neutral = row_params(SamplingParams(max_tokens=1), eos=())
        return cls(
            jax.tree.map(lambda one: jnp.broadcast_to(one, (rows, *one.shape)), neutral),
            made=jnp.zeros(rows, jnp.int32),
            counts=jnp.zeros((rows, vocab), jnp.int32),
            in_prompt=jnp.zeros((rows, vocab), bool),
        )


def row_params(sampling: SamplingParams, eos: tuple[int, ...]) -> RowParams:
    """A request's settings as the arrays of one row, on the host.

    Args:
        sampling: already within its ranges. Ids that no vocabulary has are left out.
        eos: the model's own stop tokens.
    """
    stops = dict.fromkeys([*(() if sampling.ignore_eos else eos), *sampling.stop_tokens])
    values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    values[: len(sampling.logit_bias)] = list(sampling.logit_bias.values())
    temperature = max(sampling.temperature, COLDEST) if sampling.temperature else 0.0
    return RowParams(
        temperature=np.array(temperature, np.float32),
        top_k=np.array(min(sampling.top_k, LARGEST_INT), np.int32),
        top_p=np.array(sampling.top_p, np.float32),
        min_p=np.array(sampling.min_p, np.float32),
        repetition_penalty=np.array(sampling.repetition_penalty, np.float32),
        frequency_penalty=np.array(sampling.frequency_penalty, np.float32),
        presence_penalty=np.array(sampling.presence_penalty, np.float32),
        seed=np.array(sampling.seed, np.uint32),
        min_tokens=np.array(min(sampling.min_tokens, LARGEST_INT), np.int32),
        bias_ids=_padded(sampling.logit_bias, MAX_LOGIT_BIAS),
        bias_values=values,
        stop_ids=_padded(stops, MAX_STOP_TOKENS + MAX_EOS_TOKENS),
    )


def _padded(ids: Iterable[int], size: int) -> np.ndarray:
    known = [token if 0 <= token < NO_TOKEN else NO_TOKEN for token in ids]
    return np.array(known + [NO_TOKEN] * (size - len(known)), np.int32)


def set_row(state: SamplerState, row: Int[Array, ""] | int, params: RowParams) -> SamplerState:
    """Give a row to a new request: its settings, nothing seen, nothing made.

    A row that loses its request should be set to that of `SamplingParams(max_tokens=1)`: what no
    row asks for is skipped for the whole batch, and an old row's settings still ask.
    """
    return SamplerState(
        jax.tree.map(lambda rows, one: rows.at[row].set(one), state.params, params),
        made=state.made.at[row].set(0),
        counts=state.counts.at[row].set(0),
        in_prompt=state.in_prompt.at[row].set(False),
    )


def mark_prompt(
    state: SamplerState,
    row: Int[Array, ""] | int,
    tokens: Int[Array, "N"],
    valid: Int[Array, ""] | int,
) -> SamplerState:
    """Note that a row's prompt holds the first `valid` of `tokens`; a prompt may come in parts."""
    ids = jnp.where(jnp.arange(tokens.shape[0]) < valid, tokens, NO_TOKEN)
    return state._replace(in_prompt=state.in_prompt.at[row, ids].set(True, mode="drop"))


def record(state: SamplerState, tokens: Int[Array, "R"], active: Bool[Array, "R"]) -> SamplerState:
    """Note that each active row made its token; the others stay as they are."""
    one = active.astype(jnp.int32)
    rows = jnp.arange(tokens.shape[0])
    counts = state.counts.at[rows, tokens].add(one, mode="drop", unique_indices=True)
    return state._replace(made=state.made + one, counts=counts)
