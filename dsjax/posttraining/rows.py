"""Questions with their answers, packed into rows; everything a step needs to know of each place.

A place knows of the token that it predicts, the next one. What is trained is a matter of positions,
never of token ids: eos, which may be the padding too, is trained where an answer ends with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from dsjax.data.packing import best_fit

HostOrDevice = Any
"""numpy arrays where they are made, jax arrays in a step."""


@dataclasses.dataclass(frozen=True)
class Written:
    """An answer as it was drawn."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """The answer; what ended it, eos or another stop token, is the last of them."""
    logprobs: tuple[float, ...]
    """Of each token, in the distribution that it was drawn from."""
    truncated: bool
    experts: Int[np.ndarray, "N L K"] | None
    """Where each token but the last went, prompt included."""


class Rows(NamedTuple):
    """M microbatches of B rows of S places."""

    tokens: Int[HostOrDevice, "M B S"]
    segment_ids: Int[HostOrDevice, "M B S"]
    weights: Float[HostOrDevice, "M B S"]
    """What the next token counts; 0 where it is no answer's, or has no gradient."""
    advantages: Float[HostOrDevice, "M B S"]
    old: Float[HostOrDevice, "M B S"]
    """Its log-probability when it was drawn."""
    experts: Int[HostOrDevice, "M B S L K"] | None
    """Where each token goes; -1 where the router is free."""

    @property
    def trained(self) -> Bool[HostOrDevice, "M B S"]:
        """Whether the next token counts."""
        return self.weights > 0


def pack(
    written: Sequence[Written],
    advantages: Float[np.ndarray, "N"],
    weights: Float[np.ndarray, "N"],
    *,
    microbatch_size: int,
    sequence_length: int,
    slots: int,
    replay: bool,
) -> tuple[Rows, int]:
    """Rows of whole answers, and how many microbatches of them are not empty.

    Args:
        advantages: of each answer.
        weights: of each of its tokens; answers without weight are left out.
        slots: M, whatever is in them: the step is compiled for it.
        replay: whether `experts` is filled.
    """
    used = [i for i in range(len(written)) if weights[i] > 0]
    lengths = [len(written[i].prompt) + len(written[i].tokens) for i in used]
    shape = (slots * microbatch_size, sequence_length)
    tokens, segments = np.zeros((2, *shape), np.int32)
    counts, worth, old = np.zeros((3, *shape), np.float32)
    experts = None
    if replay and written[0].experts is not None:
        experts = np.full((*shape, *written[0].experts.shape[1:]), -1, np.int16)
    rows = best_fit(lengths, sequence_length)
    for row, pieces in enumerate(rows):
        begin = 0
        for segment, piece in enumerate(pieces, 1):
            one, number = written[used[piece]], used[piece]
            middle, end = begin + len(one.prompt), begin + lengths[piece]
            tokens[row, begin:end] = one.prompt + one.tokens
            segments[row, begin:end] = segment
            answer = slice(middle - 1, end - 1)
            counts[row, answer] = weights[number]
            worth[row, answer] = advantages[number]
            old[row, answer] = one.logprobs
            if experts is not None and one.experts is not None:
                experts[row, begin : end - 1] = one.experts
            begin = end
    made = Rows(tokens, segments, counts, worth, old, experts)
    cut = (slots, microbatch_size)
    made = jax.tree.map(lambda x: x.reshape(*cut, *x.shape[1:]), made)
    return made, -(-len(rows) // microbatch_size)
