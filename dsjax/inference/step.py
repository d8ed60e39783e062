"""One step of the engine on the device: tokens in, sampled tokens and drafts out.

One function serves prompts and continuations, with and without drafts. What differs from step to
step are array values; what is compiled is a shape (rows, tokens a row) with a number of samples and
of drafts. Everything that a request can set is a value.

Drafts. The main model reads a row's newest token and its drafts at once. At each place the next
token is drawn from the model's own distribution; as long as it is the draft that was read there,
the next place's draw is valid too. For a draft that is certain, as ours is, that is rejection
sampling (arXiv:2211.17192, section 2.3: accept x with probability p(x), else draw from the rest of
p), and since a draw depends on seed and place alone, the tokens are the very ones that would have
come without drafts. Then the MTP module reads the same places with the tokens now known to follow
(DeepSeek-V3, arXiv:2412.19437, section 2.2), and its likeliest token is the next draft; further
ones come from feeding its own output back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.inference.sampler_state import SamplerState, record
from dsjax.inference.sampling import adjusted, logprobs, sample
from dsjax.kernels.paged_attention import Places, places_of
from dsjax.model.decoder import Decoder, Pages
from sharding.rules import constrain

POSITIONS_AT_ONCE = 32
"""Positions of a prompt whose logits exist at the same time."""


class StepInputs(NamedTuple):
    """What the host says of a step. B rows, group by group; those past the last are padding."""

    rows: Int[Array, "B"]
    """The sampler's row, within the group; one past its last for padding."""
    tokens: Int[Array, "B Q"]
    next_tokens: Int[Array, "B Q"]
    """What follows each token, where the prompt says so."""
    starts: Int[Array, "B"]
    """Position of the first token."""
    counts: Int[Array, "B"]
    """How many of the Q tokens are meant."""
    table: Int[Array, "B P"]
    samples: Bool[Array, "B"]
    """Whether this row is continued, or a part of its prompt is only read."""
    first: Int[Array, "B"]
    """At which of the Q places the first token is sampled."""
    logprobs: Bool[Array, ""]
    """Whether any row wants log-probabilities of what it samples; likewise of its prompt."""
    prompt_logprobs: Bool[Array, ""]


class Logprobs(NamedTuple):
    """Log-probabilities of tokens, and the likeliest tokens in their places with theirs."""

    chosen: Float[Array, "*N"]
    top: Int[Array, "*N K"]
    top_values: Float[Array, "*N K"]


class StepOutputs(NamedTuple):
    """What the host reads back."""

    tokens: Int[Array, "B D"]
    valid: Int[Array, "B"]
    """How many of the D tokens are the row's continuation."""
    drafts: Int[Array, "B M"]
    """What MTP expects to follow them."""
    logprobs: Logprobs
    drawn_logprobs: Float[Array, "B D"]
    """Of the tokens, in the distribution that they were drawn from."""
    prompt_logprobs: Logprobs | None
    """Of `next_tokens` at every place, [B, Q]."""
    experts: Int[Array, "B Q L K"]
    """Which experts each expert layer sent the tokens to that were read."""


@lru_cache
def step_for(structure: Any) -> Callable[..., tuple[Pages, SamplerState, StepOutputs]]:
    """The jitted `step` of decoders of this tree structure, which takes their leaves.

    Flattening a decoder takes Python longer than a small model's step; so it is done once.
    """

    @partial(
        jax.jit,
        static_argnames=("samples", "drafts"),
        donate_argnames=("pages", "sampler"),
    )
    def run(
        leaves: list[Array],
        pages: Pages,
        sampler: SamplerState,
        inputs: StepInputs,
        vocab_size: Int[Array, ""],
        *,
        samples: int,
        drafts: int,
    ) -> tuple[Pages, SamplerState, StepOutputs]:
        decoder = jax.tree.unflatten(structure, leaves)
        return step(decoder, pages, sampler, inputs, vocab_size, samples, drafts)

    return run


def step(
    decoder: Decoder,
    pages: Pages,
    sampler: SamplerState,
    inputs: StepInputs,
    vocab_size: Int[Array, ""],
    samples: int,
    drafts: int,
) -> tuple[Pages, SamplerState, StepOutputs]:
    """Extend rows by their tokens, and sample up to `samples` tokens for those that want it."""
    groups, page_count, page_size, _ = pages[0].shape
    queries = inputs.tokens.shape[1]
    find = partial(places_of, table=inputs.table, pages=page_count, page_size=page_size)
    places = find(inputs.starts, inputs.counts, queries=queries)
    hidden, pages, experts = decoder.extend(inputs.tokens, pages, places)

    mine = _take_rows(sampler, inputs.rows, groups)
    tokens, valid, chances, drawn = _draw(decoder, hidden, mine, inputs, vocab_size, samples)
    sampler = _record_rows(sampler, inputs.rows, tokens, valid, groups)

    ahead = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    if drafts:
        pages, ahead = _draft(
            decoder, pages, hidden, inputs, places, find, tokens, valid, vocab_size, drafts
        )
    prompt = None
    if samples == 1 and queries > 1:
        prompt = _prompt_logprobs(decoder, hidden, inputs, vocab_size)
    found = StepOutputs(tokens, valid, ahead, chances, drawn, prompt, experts)
    return pages, sampler, jax.tree.map(_everywhere, found)


def _everywhere(found: Array) -> Array:
    """Of several processes, each plans the next step from all that this one has found."""
    return constrain(found, *(None,) * found.ndim)


def _draw(
    decoder: Decoder,
    hidden: Array,
    sampler: SamplerState,
    inputs: StepInputs,
    vocab_size: Array,
    samples: int,
) -> tuple[Array, Array, Logprobs, Array]:
    """Sample place after place, as long as what is drawn is what was read at the next place."""
    drawn, chances = [], []
    active, valid = inputs.samples, jnp.zeros_like(inputs.counts)
    for number in range(samples):
        at = inputs.first + number
        here = jnp.take_along_axis(hidden, at[:, None, None], axis=1, mode="clip")[:, 0]
        logits = decoder.logits(here)
        token = sample(logits, sampler, vocab_size)
        chances.append((
            _logprobs(logits, token, vocab_size, inputs.logprobs),
            _drawn_logprob(logits, token, sampler, vocab_size, inputs.logprobs),
        ))  # fmt: skip
        sampler = record(sampler, token, active)
        valid += active
        drawn.append(token)
        read_next = jnp.take_along_axis(inputs.tokens, at[:, None] + 1, axis=1, mode="clip")[:, 0]
        active &= (at + 1 < inputs.counts) & (read_next == token)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1), *chances)
    return jnp.stack(drawn, axis=1), valid, *stacked


def _draft(
    decoder: Decoder,
    pages: Pages,
    hidden: Array,
    inputs: StepInputs,
    places: Places,
    find: Any,
    tokens: Array,
    valid: Array,
    vocab_size: Array,
    drafts: int,
) -> tuple[Pages, Array]:
    """Let MTP read what the main model read, and say what it expects after the last token."""
    rows = jnp.arange(tokens.shape[0])
    follow = inputs.next_tokens
    for number in range(tokens.shape[1]):
        at = jnp.where(number < valid, inputs.first + number, follow.shape[1])
        follow = follow.at[rows, at].set(tokens[:, number], mode="drop")
    ahead, pages = decoder.look_ahead(follow, hidden, pages, places)
    last = jnp.maximum(inputs.first + valid - 1, 0)
    ahead = jnp.take_along_axis(ahead, last[:, None, None], axis=1, mode="clip")
    found = [_likeliest(decoder, ahead, vocab_size)]
    for number in range(1, drafts):
        further = find(inputs.starts + last + number, jnp.sign(valid), queries=1)
        ahead, pages = decoder.look_ahead(found[-1][:, None], ahead, pages, further)
        found.append(_likeliest(decoder, ahead, vocab_size))
    return pages, jnp.stack(found, axis=1)


def _likeliest(decoder: Decoder, hidden: Array, vocab_size: Array) -> Array:
    logits = decoder.logits(hidden[:, 0])
    known = jnp.arange(logits.shape[1])[None] < vocab_size
    return jnp.where(known, logits, -jnp.inf).argmax(-1).astype(jnp.int32)


def _prompt_logprobs(
    decoder: Decoder, hidden: Array, inputs: StepInputs, vocab_size: Array
) -> Logprobs:
    """Log-probabilities of every next token, a few positions at a time; zeros if none is wanted."""
    batch, queries, _ = hidden.shape
    turns = max(1, queries // POSITIONS_AT_ONCE)

    def some(index: Array) -> Logprobs:
        begin, count = index * (queries // turns), queries // turns
        h, tokens = (
            jax.lax.dynamic_slice_in_dim(a, begin, count, 1) for a in (hidden, inputs.next_tokens)
        )
        logits = decoder.logits(h.reshape(batch * count, -1))
        flat = _logprobs(logits, tokens.ravel(), vocab_size, inputs.prompt_logprobs)
        return jax.tree.map(lambda a: a.reshape(batch, count, *a.shape[1:]), flat)

    def together(parts: Array) -> Array:
        return jnp.moveaxis(parts, 0, 1).reshape(batch, queries, *parts.shape[3:])

    def nothing() -> Logprobs:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(everything))

    def everything() -> Logprobs:
        return jax.tree.map(together, jax.lax.map(some, jnp.arange(turns)))

    return jax.lax.cond(inputs.prompt_logprobs, everything, nothing)


def _logprobs(logits: Array, tokens: Array, vocab_size: Array, wanted: Array) -> Logprobs:
    def compute() -> Logprobs:
        return Logprobs(*logprobs(logits, tokens, vocab_size))

    def nothing() -> Logprobs:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(compute))

    return jax.lax.cond(wanted, compute, nothing)


def _drawn_logprob(
    logits: Array, tokens: Array, sampler: SamplerState, vocab_size: Array, wanted: Array
) -> Array:
    """Of each token in the distribution that the settings make of the logits."""

    def compute() -> Array:
        left = adjusted(logits, sampler, vocab_size)
        chosen = jnp.take_along_axis(left, tokens[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(left, axis=-1)

    return jax.lax.cond(wanted, compute, lambda: jnp.zeros(tokens.shape))


def _take_rows(state: SamplerState, rows: Array, groups: int) -> SamplerState:
    """The sampler's rows that take part in this step.

    What was said is an array of [rows, vocabulary]: it is read when a penalty asks for it.
    """
    params, made = jax.tree.map(lambda a: _rows_of(a, rows, groups), (state.params, state.made))
    neutral = (
        (params.repetition_penalty == 1)
        & (params.frequency_penalty == 0)
        & (params.presence_penalty == 0)
    )

    def nothing(said: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(lambda a: jnp.zeros((rows.shape[0], a.shape[1]), a.dtype), said)

    def find(said: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(lambda a: _rows_of(a, rows, groups), said)

    said = jax.lax.cond(neutral.all(), nothing, find, (state.counts, state.in_prompt))
    return SamplerState(params, made, *said)


def _rows_of(array: Array, rows: Array, groups: int) -> Array:
    apart = array.reshape(groups, -1, *array.shape[1:])
    at = rows.reshape(groups, -1)
    found = jax.vmap(lambda one, i: one.at[i].get(mode="clip"))(apart, at)
    return found.reshape(rows.shape[0], *array.shape[1:])


def _record_rows(
    state: SamplerState, rows: Array, tokens: Array, valid: Array, groups: int
) -> SamplerState:
    """Note what rows made, in the state of all rows."""
    count = tokens.shape[1]
    new = (jnp.arange(count)[None] < valid[:, None]).astype(jnp.int32)
    at, vocab = rows.reshape(groups, -1), state.counts.shape[1]

    def count_up(counts: Array, i: Array, token: Array, one: Array) -> Array:
        return counts.at[i[:, None], token].add(one, mode="drop")

    def move_on(made: Array, i: Array, by: Array) -> Array:
        return made.at[i].add(by, mode="drop")

    counts = jax.vmap(count_up)(
        state.counts.reshape(groups, -1, vocab),
        at,
        tokens.reshape(*at.shape, count),
        new.reshape(*at.shape, count),
    )
    made = jax.vmap(move_on)(state.made.reshape(groups, -1), at, valid.reshape(at.shape))
    return state._replace(
        counts=counts.reshape(state.counts.shape), made=made.reshape(state.made.shape)
    )
