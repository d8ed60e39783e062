"""Questions: from files or made up, in an order without end, and some of them held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from grain.experimental import index_shuffle

from dsjax.config_grpo import PromptsConfig
from dsjax.data.files import find_files
from dsjax.data.language import Language
from dsjax.data.records import read_rows
from dsjax.errors import UserError

Check = Callable[[Mapping[str, Any], str], None]
"""Of a question, and where it stands; raises `UserError`."""

COMPARISON = "comparison"
"""The name of questions that need no file."""

_ROUNDS = 4


class Comparisons(Sequence[Mapping[str, Any]]):
    """A million pairs of numbers of three digits: which sign stands between them is asked for."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        a, b = divmod(range(len(self))[index], 1000)
        return {"prompt": f"{a:03}?{b:03}:", "answer": "<=>"[(a >= b) + (a > b)]}


class Questions:
    """What is asked. Each is a mapping with `prompt`, and whatever rewards want to know.

    Args:
        records: all questions.
        config: which of them are held out, and the template of those that are texts.
        seed: of the order; every epoch has one of its own.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], config: PromptsConfig, seed: int):
        self._records = records
        self._template = config.template
        self._fraction = config.held_out_fraction
        self._seed = seed

    @property
    def digest(self) -> str:
        """Of all questions, hexadecimal."""
        found = hashlib.blake2b(digest_size=16)
        for record in self._looked_at():
            found.update(json.dumps(record, sort_keys=True, default=str).encode())
        return found.hexdigest()

    def training(self, begin: int, count: int) -> tuple[list[Mapping[str, Any]], int]:
        """So many questions from place `begin` of the endless order on, and the place after them.

        Those that are held out take a place, and are passed over.
        """
        found = []
        while len(found) < count:
            record = self._at(begin)
            begin += 1
            if not self._is_held_out(record):
                found.append(record)
        return found, begin

    def once(self, count: int | None) -> list[tuple[int, Mapping[str, Any]]]:
        """All questions that are not held out, or the first so many of the order of training.

        Each with its number in the files, from 0 on, by which the list is sorted.
        """
        numbers = (self._number(place) for place in range(len(self._records)))
        kept = (n for n in numbers if not self._is_held_out(self._records[n]))
        return [(number, self._records[number]) for number in sorted(islice(kept, count))]

    def held_out(self, count: int) -> list[Mapping[str, Any]]:
        """The first so many of those that are never trained on, or all there are."""
        places = range(len(self._records)) if self._fraction else range(0)
        order = (self._at(place) for place in places)
        found = (record for record in order if self._is_held_out(record))
        return list(islice(found, count))

    def encode(self, record: Mapping[str, Any], language: Language) -> tuple[int, ...]:
        """The tokens of a question.

        Raises:
            UserError: it is messages, and the checkpoint has no chat template or refuses them.
        """
        said = self.said(record)
        return tuple(language.text(said) if isinstance(said, str) else language.chat(said))

    def said(self, record: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        """A question as it is asked: messages, or a text in the template."""
        prompt = record["prompt"]
        if isinstance(prompt, str) and self._template is not None:
            return self._template.replace("{prompt}", prompt)
        return prompt

    def check(self, language: Language, longest: int) -> None:
        """See that every question can be asked, and has at most `longest` tokens.

        Raises:
            UserError: one cannot.
        """
        for number, record in enumerate(self._looked_at(), 1):
            tokens = len(self.encode(record, language))
            if tokens > longest:
                raise UserError(
                    f"prompt {number} has {tokens} tokens, and training.sequence_length less "
                    f"sampling.max_tokens leaves {longest}; raise the first, or leave it out"
                )

    def _looked_at(self) -> Sequence[Mapping[str, Any]]:
        """All questions, or one of those that are made up, which are all alike."""
        alike = isinstance(self._records, Comparisons)
        return [self._records[0]] if alike else self._records

    def _at(self, place: int) -> Mapping[str, Any]:
        return self._records[self._number(place)]

    def _number(self, place: int) -> int:
        epoch, number = divmod(place, len(self._records))
        seed = (self._seed * 1_000_003 + epoch) % 2**32
        last = len(self._records) - 1
        return index_shuffle(number, last, seed=seed, rounds=_ROUNDS)

    def _is_held_out(self, record: Mapping[str, Any]) -> bool:
        if not self._fraction:
            return False
        text = json.dumps(record["prompt"], sort_keys=True).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._fraction * 2**64


def open_questions(config: PromptsConfig, check: Check, seed: int) -> Questions:
    """Find and check all questions.

    Args:
        config: where they are.
        check: whether rewards find in a question what they need.
        seed: of their order.

    Raises:
        UserError: no file, or a question without what it needs; the message names its line.
    """
    if config.path == COMPARISON:
        return Questions(Comparisons(), config, seed)
    records = []
    for file in find_files(config.path, "prompts.path"):
        for where, record in read_rows(file.path):
            _check_prompt(record.get("prompt"), where)
            check(record, where)
            records.append(record)
    if not records:
        raise UserError(f"{config.path}: there is no question in it")
    questions = Questions(records, config, seed)
    if config.held_out_fraction and len(questions.held_out(len(records))) == len(records):
        raise UserError(f"{config.path}: all {len(records)} questions are held out; give more")
    return questions


def _check_prompt(prompt: Any, where: str) -> None:
    if not (isinstance(prompt, str | list) and prompt):
        raise UserError(f"{where}: prompt is {prompt!r}; expected a text or messages")
