"""DeepSeek-R1's protocol: k samples of each question, drawn at temperature 0.6 and top-p 0.95.

arXiv:2501.12948, section 3, and the README of DeepSeek-R1: at most 32,768 tokens, 64 samples where
a task is small, pass@1 their mean; greedy decoding repeats itself and ranks checkpoints by chance.

Differs from the paper: each sample's seed is computed from what it answers, so that a sample is the
same whatever runs beside it, in whichever order, before or after a kill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dsjax.errors import UserError
from dsjax.evaluation.settings import Settings
from dsjax.evaluation.task import Task
from dsjax.inference import drawing
from dsjax.inference.drawing import seed_of
from dsjax.inference.reader import Reader
from dsjax.inference.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine


class Key(NamedTuple):
    """Which sample a record is about."""

    task: str
    question: str
    sample: int


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


def draw(
    engine: Engine,
    reader: Reader,
    settings: Settings,
    samples: Sequence[Sample],
    write: Callable[[Key, dict[str, Any]], None],
) -> Iterator[int]:
    """Draw the samples and `write` each as soon as it is whole.

    A record has its question's `digest`, `text` (think tags spelled out), `tokens` (eos counted)
    and `truncated` (it ran into its limit). After each step yields the tokens made so far.
    """
    named = {"/".join(map(str, sample.key)): sample for sample in samples}

    def take(name: str, tokens: list[int], finish: FinishReason) -> None:
        sample = named[name]
        record = {
            "digest": sample.digest,
            "text": reader.decode(tokens),
            "tokens": len(tokens),
            "truncated": finish == "length",
        }
        write(sample.key, record)

    requests = (
        Request(name, sample.prompt, _sampling(reader, settings, sample))
        for name, sample in named.items()
    )
    return drawing.draw(engine, requests, take)


def _sampling(reader: Reader, settings: Settings, sample: Sample) -> SamplingParams:
    return SamplingParams(
        max_tokens=sample.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_tokens=reader.stop_tokens,
        seed=sample.seed,
    )
