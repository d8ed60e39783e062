"""One choice of a response as it grows: what an update adds to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from dsjax.data.thinking import Field, Piece, Speech
from dsjax.inference.request import FinishReason, TokenLogprob, Update

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""


class Score(NamedTuple):
    """A token's log-probabilities, and where it stands."""

    field: Field
    offset: int
    """Characters of the text before it."""
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass
class Part:
    """What an update adds to a choice; all of them together are the choice."""

    text: dict[Field, str] = dataclasses.field(default_factory=dict)
    scores: list[Score] = dataclasses.field(default_factory=list)
    finish: FinishReason | None = None

    def say(self, pieces: Iterable[Piece]) -> None:
        """Add text, if there is any."""
        for field, text in pieces:
            if text:
                self.text[field] = self.text.get(field, "") + text


@dataclasses.dataclass
class Choice:
    """One continuation of one prompt."""

    index: int
    prompt: tuple[int, ...]
    speech: Speech
    first: bool = True
    """Of those of its prompt."""
    min_tokens: int = 0
    """Before so many tokens no stop string is looked for."""
    silent: bool = False
    """max_tokens is 0: the engine makes one token all the same, and it is not shown."""
    echo: int | None = None
    """The text begins with the prompt, from this token on: bos that we added is no text."""
    parts: list[Part] = dataclasses.field(default_factory=list)
    waiting: list[Score] = dataclasses.field(default_factory=list)
    """Scores of tokens at the beginning, while white space or a part of <think> has no field."""
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def done(self) -> bool:
        """Whether there is no more to come."""
        return bool(self.parts) and self.parts[-1].finish is not None

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it, perhaps before the engine did."""
        return self.speech.stopped

    def whole(self) -> Part:
        """All parts as one."""
        texts: dict[Field, list[str]] = {}
        for part in self.parts:
            for field, text in part.text.items():
                texts.setdefault(field, []).append(text)
        return Part(
            text={field: "".join(pieces) for field, pieces in texts.items()},
            scores=[score for part in self.parts for score in part.scores],
            finish=self.parts[-1].finish if self.parts else None,
        )

    def take(self, update: Update) -> Part:
        """Add what the engine made; returns what is new.

        A token at which the engine stopped is not shown, but counted, and so are those of a stop
        string. What the engine made behind a stop string is as if it had never been.
        """
        part = Part()
        if not self.parts:
            self._begin(update, part)
        self.parts.append(part)
        tokens = () if self.silent else update.tokens
        last = len(tokens) - 1 if update.finish == "stop" else None
        for place, token in enumerate(tokens):
            score = update.logprobs[place] if update.logprobs else None
            self._take_token(token, score, part, shown=place != last)
            if self.stopped:
                break
        if update.finish or self.stopped:
            part.say(self.speech.finish())
            self._settle(part)
            # What is held back to the end may still hold a stop string.
            part.finish = "stop" if self.stopped else "length" if self.silent else update.finish
        return part

    def _begin(self, update: Update, part: Part) -> None:
        self.cached_tokens = update.cached_tokens
        if self.echo is None:
            return
        scores = update.prompt_logprobs or (None,) * len(self.prompt)
        for place, (token, score) in enumerate(zip(self.prompt, scores, strict=True)):
            offset = self.speech.characters
            if place >= self.echo:
                part.say([("text", self.speech.echo(token))])
            if update.prompt_logprobs:
                part.scores.append(_score("text", offset, token, score))

    def _take_token(self, token: int, score: TokenLogprob | None, part: Part, shown: bool) -> None:
        offset = self.speech.characters
        self.completion_tokens += 1
        field = self.speech.field
        if shown:
            watch = self.completion_tokens > self.min_tokens
            part.say(self.speech.push(token, watch))
        if score is None:
            return
        self._settle(part)
        if (field := field or self.speech.field) is None:
            self.waiting.append(_score("content", offset, token, score))
        else:
            part.scores.append(_score(field, offset, token, score))

    def _settle(self, part: Part) -> None:
        """Add the scores that waited, once their tokens have a field."""
        if self.waiting and (field := self.speech.field) is not None:
            part.scores += [score._replace(field=field) for score in self.waiting]
            self.waiting.clear()


def _score(field: Field, offset: int, token: int, score: TokenLogprob | None) -> Score:
    if score is None:
        return Score(field, offset, token, None, ())
    top = tuple((other, max(logprob, LOWEST_LOGPROB)) for other, logprob in score.top)
    return Score(field, offset, token, max(score.logprob, LOWEST_LOGPROB), top)
