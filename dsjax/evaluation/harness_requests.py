"""What lm-evaluation-harness asks, as requests of the engine, and what comes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from dsjax.data.thinking import ThoughtfulSpeech
from dsjax.errors import UserError
from dsjax.inference.request import LARGEST_SEED, SamplingParams, TokenLogprob, Update

MAX_GEN_TOKS = 256
"""Tokens to generate where a task does not say; the harness's own models have the same."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the limit; of several, the first counts, as in the harness."""
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")

Result = TypeVar("Result", covariant=True)


class Collector(Protocol[Result]):
    """Takes a request's updates."""

    def take(self, update: Update) -> bool:
        """Whether no more is needed."""
        ...

    def result(self) -> Result:
        """What came of them."""
        ...


class Likelihood:
    """Sums the log-probabilities of a prompt's last `count` tokens."""

    def __init__(self, count: int):
        self._count = count
        self._found: list[TokenLogprob] = []

    def take(self, update: Update) -> bool:
        """All of it is in the first update."""
        chosen = [token for token in update.prompt_logprobs if token is not None]
        self._found = chosen[-self._count :]
        assert len(self._found) == self._count
        return True

    def result(self) -> tuple[float, bool]:
        """The sum, and whether each token is the likeliest in its place."""
        greedy = all(one.token == one.top[0][0] for one in self._found)
        return sum(one.logprob for one in self._found), greedy


class Content:
    """The content of what is generated, up to a stop string: a thought is no part of it."""

    def __init__(self, speech: ThoughtfulSpeech):
        self._speech = speech
        self._text = ""

    def take(self, update: Update) -> bool:
        """Whether a stop string has come."""
        pieces = [piece for token in update.tokens for piece in self._speech.push(token)]
        if update.finish is not None:
            pieces += self._speech.finish()
        self._text += "".join(text for field, text in pieces if field == "content")
        return self._speech.stopped

    def result(self) -> tuple[str, bool]:
        """The text before it, and whether the thought came to its end."""
        return self._text, self._speech.field != "reasoning_content"


def read_options(
    options: Mapping[str, Any], stop_tokens: tuple[int, ...]
) -> tuple[SamplingParams, list[str]]:
    """A task's generation options: how to sample, and the stop strings.

    Without `do_sample`, and without a temperature, the likeliest tokens are taken.

    Raises:
        UserError: an option that is not known here, or a value that cannot be.
    """
    given = dict(options)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    lengths = [found for name in _LENGTHS if (found := given.pop(name, None)) is not None]
    temperature = float(given.pop("temperature", 0.0) or 0.0)
    if given.pop("do_sample", None) is False:
        temperature = 0.0
    changed = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
    unknown = [name for name, value in given.items() if value is not None]
    if unknown:
        known = ("until", *_LENGTHS, "do_sample", "temperature", *_SAMPLING)
        raise UserError(
            f"a task generates with {unknown[0]}={given[unknown[0]]!r}, which is not known here; "
            f"known are {', '.join(known)}"
        )
    sampling = SamplingParams(
        max_tokens=int(lengths[0]) if lengths else MAX_GEN_TOKS,
        temperature=temperature,
        stop_tokens=stop_tokens,
        **changed,
    )
    return sampling, [stop for stop in until if stop]


def seed_of_text(text: str, number: int) -> int:
    """The seed of the `number`th sample of a text: the same in every call."""
    digest = hashlib.blake2b(repr((text, number)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (LARGEST_SEED + 1)
