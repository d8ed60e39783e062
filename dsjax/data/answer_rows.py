"""Rows of whole conversations, packed anew every epoch, out of tokens that are made once.

The place in the data is a number: which microbatch comes next. What is in it follows from the
examples, the seed and the epoch, so a resumed run reads on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dsjax.data.answers import AnswerEncoder, Example
from dsjax.data.batches import Batches
from dsjax.data.chat_template import TemplateError
from dsjax.data.conversations import Conversation
from dsjax.data.held_out import HeldOutRows
from dsjax.data.packing import best_fit
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError


class Examples(Sequence[Example]):
    """Many of them in two arrays: five bytes a token."""

    def __init__(self, examples: Iterable[Example]) -> None:
        found = list(examples)
        empty = Example(np.empty(0, np.int32), np.empty(0, bool))
        self._tokens, self._trained = map(np.concatenate, zip(*found, empty, strict=True))
        self._ends = np.cumsum([0, *(len(example.tokens) for example in found)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        part = slice(self._ends[index], self._ends[index + 1])
        return Example(self._tokens[part], self._trained[part])

    @property
    def lengths(self) -> Int64[np.ndarray, " N"]:
        """Tokens of each."""
        return np.diff(self._ends)

    @property
    def digest(self) -> str:
        """SHA-256 of all there is."""
        parts = (self._tokens, self._trained, self._ends)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def make_examples(
    conversations: Sequence[Conversation], encoder: AnswerEncoder, longest: int
) -> tuple[Examples, int]:
    """What of conversations is trained, and how many examples are left out as too long.

    An example that does not fit into a row is left out: half an answer has no end.

    Raises:
        UserError: the template does not take one, or none fits.
    """
    made = [example for one in conversations for example in _encoded(one, encoder)]
    fitting = [example for example in made if len(example.tokens) <= longest]
    if not fitting:
        shortest = min(len(example.tokens) for example in made)
        raise UserError(
            f"data.sequence_length={longest}: all {len(made)} examples are longer, the shortest "
            f"has {shortest} tokens; raise it"
        )
    return Examples(fitting), len(made) - len(fitting)


def _encoded(conversation: Conversation, encoder: AnswerEncoder) -> list[Example]:
    try:
        return encoder.examples(conversation)
    except TemplateError as error:
        raise UserError(f"{conversation.where}: {error}; change it, or leave it out") from None


class EpochRows:
    """Which examples share each row, epoch by epoch; every example comes once in each.

    Rows are filled by best fit over a whole epoch, and come in a random order.
    """

    def __init__(self, lengths: Int64[np.ndarray, " N"], row_length: int, seed: int) -> None:
        self._lengths = lengths
        self._row_length = row_length
        self._seed = seed
        self._rows = lru_cache(maxsize=2)(self._draw)
        self.rows_per_epoch = len(self._rows(0))

    def members(self, row: int) -> list[int]:
        """The examples of one row; rows beyond the first epoch are those of later ones."""
        epoch, place = divmod(row, self.rows_per_epoch)
        return self._rows(epoch)[place]

    def _draw(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        packed = best_fit(self._lengths[order].tolist(), self._row_length)
        rows = [[int(order[member]) for member in row] for row in packed]
        return [rows[place] for place in random.permutation(len(rows))]


class AnswerRows(Batches):
    """Microbatches of examples for some epochs, and of empty rows after them.

    Epochs follow one another without a gap: one may end, and the next begin, within a batch.

    Args:
        epochs: after which there is nothing more.
        microbatch_size: rows of a microbatch, over all processes.
        rows: which of them are read here.
        row_length: places of a row.
        seed: of what shares a row, and of the rows' order.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        epochs: int,
        microbatch_size: int,
        rows: Sequence[int],
        row_length: int,
        seed: int,
    ) -> None:
        identity = {"examples": examples.digest, "sequence_length": row_length, "seed": seed,
                    "microbatch_size": microbatch_size}  # fmt: skip
        fields = {"tokens": np.int32, "segment_ids": np.int32, "trained": np.bool_}
        super().__init__(identity, fields)
        self._examples = examples
        self._packed = EpochRows(examples.lengths, row_length, seed)
        self._last = epochs * self._packed.rows_per_epoch
        self._microbatch_size = microbatch_size
        self._here = rows
        self._row_length = row_length
        self._next = 0

    @property
    def num_tokens(self) -> int:
        """Places of all rows of all epochs, padding included."""
        return self._last * self._row_length

    def __next__(self) -> dict[str, np.ndarray]:
        numbers = [self._next * self._microbatch_size + row for row in self._here]
        members = [self._packed.members(n) if n < self._last else [] for n in numbers]
        self._next += 1
        return fill_rows([[self._examples[i] for i in row] for row in members], self._row_length)

    def position(self) -> dict[str, Any]:
        """The number of the next microbatch: the same in every process."""
        return {"microbatch": self._next}

    def move_to(self, position: dict[str, Any]) -> None:
        """Go on there."""
        self._next = position["microbatch"]

    def close(self) -> None:
        """Nothing is read ahead."""


def fill_rows(rows: Sequence[Sequence[Example]], row_length: int) -> dict[str, np.ndarray]:
    """Examples side by side in each row, every one a segment, and padding behind them.

    Returns:
        tokens, segment_ids and trained [rows, row_length]; segments count from 1, 0 is padding.
    """
    shape = len(rows), row_length
    tokens: Int32[np.ndarray, "N S"] = np.zeros(shape, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    trained: Bool[np.ndarray, "N S"] = np.zeros(shape, bool)
    for row, examples in enumerate(rows):
        begin = 0
        for segment, example in enumerate(examples, start=1):
            place = row, slice(begin, begin + len(example.tokens))
            tokens[place], trained[place] = example
            segment_ids[place] = segment
            begin += len(example.tokens)
    return {"tokens": tokens, "segment_ids": segment_ids, "trained": trained}


def held_out_answers(examples: Examples, tokenizer: Tokenizer, row_length: int) -> HeldOutRows:
    """Examples as rows whose answers are scored.

    `num_bytes` is what the answers' own tokens spell, their ends not counted.
    """
    packed = best_fit(examples.lengths.tolist(), row_length)
    np.random.default_rng(0).shuffle(packed)
    filled = fill_rows([[examples[member] for member in row] for row in packed], row_length)
    scored = np.zeros_like(filled["trained"])
    scored[:, :-1] = filled["trained"][:, 1:]
    added = set(tokenizer.added_tokens.values())
    answers = (int(token) for token in filled["tokens"][filled["trained"]])
    num_bytes = sum(len(tokenizer.token_bytes(token)) for token in answers if token not in added)
    return HeldOutRows(filled["tokens"], filled["segment_ids"], scored, num_bytes)
