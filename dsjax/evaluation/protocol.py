"""DeepSeek-R1's protocol: k samples of each question, drawn at temperature 0.6 and top-p 0.95.

arXiv:2501.12948, section 3, and the README of DeepSeek-R1: at most 32,768 tokens, 64 samples where
a task is small, pass@1 their mean; greedy decoding repeats itself and ranks checkpoints by chance.

Differs from the paper: each sample's seed is computed from what it answers, so that a sample is the
same whatever runs beside it, in whichever order, before or after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsjax.errors import UserError
from dsjax.evaluation.journal import Key
from dsjax.evaluation.reader import Reader
from dsjax.evaluation.settings import Settings
from dsjax.evaluation.task import Task
from dsjax.inference.request import LARGEST_SEED, Request, SamplingParams

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine

QUEUE = 2
"""Samples that are open at once, for each row of the engine: one runs, and one waits."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer that is to be drawn."""

    key: Key
    digest: str
    """Of its question."""
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int


def plan(tasks: Iterable[Task], reader: Reader, settings: Settings, context: int) -> list[Sample]:
    """Every sample of the tasks, those of one question side by side: they share its pages.

    Args:
        context: most tokens of prompt and answer together.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """
    samples = []
    for task in tasks:
        for question in task.questions:
            prompt = tuple(reader.ask(question.prompt))
            room = context - len(prompt)
            if room < 1:
                raise UserError(
                    f"{task.name}: question {question.id!r} has a prompt of {len(prompt)} tokens, "
                    f"and the context is {context}; choose a larger --context, or a model that has "
                    "one"
                )
            for number in range(settings.k):
                key = Key(task.name, question.id, number)
                limit = min(settings.max_tokens, room)
                seed = seed_of(settings.seed, key)
                samples.append(Sample(key, question.digest, prompt, limit, seed))
    return samples


def seed_of(seed: int, key: Key) -> int:
    """The seed of one sample; nothing else of an evaluation enters it."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (LARGEST_SEED + 1)


def draw(
    engine: Engine,
    reader: Reader,
    settings: Settings,
    samples: Iterable[Sample],
    write: Callable[[Key, dict[str, Any]], None],
) -> Iterator[int]:
    """Draw the samples and `write` each as soon as it is whole.

    A record has its question's `digest`, `text` (think tags spelled out), `tokens` (eos counted)
    and `truncated` (it ran into its limit). After each step yields the tokens made so far.
    """
    waiting = iter(samples)
    open_: dict[str, tuple[Sample, list[int]]] = {}
    made = 0
    while True:
        while len(open_) < QUEUE * engine.settings.rows and (sample := next(waiting, None)):
            request_id = "/".join(map(str, sample.key))
            engine.submit(Request(request_id, sample.prompt, _sampling(reader, settings, sample)))
            open_[request_id] = sample, []
        if not open_:
            return
        for update in engine.step():
            sample, tokens = open_[update.request_id]
            tokens += update.tokens
            made += len(update.tokens)
            if update.finish is None:
                continue
            del open_[update.request_id]
            write(
                sample.key,
                {
                    "digest": sample.digest,
                    "text": reader.decode(tokens),
                    "tokens": len(tokens),
                    "truncated": update.finish == "length",
                },
            )
        yield made


def _sampling(reader: Reader, settings: Settings, sample: Sample) -> SamplingParams:
    return SamplingParams(
        max_tokens=sample.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_tokens=reader.stop_tokens,
        seed=sample.seed,
    )
