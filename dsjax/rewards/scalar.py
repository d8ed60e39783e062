"""A scalar reward model: a checkpoint of ours, and beside its weights a head of one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.checkpoint.load import load
from dsjax.checkpoint.safetensors import read_header
from dsjax.config_rewards import ModelReward
from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError, hub_hint
from dsjax.places import as_path
from dsjax.rewards.answer import Answer
from dsjax.rewards.value import Value

HEAD = "reward_head.safetensors"
_SHORTEST = 64
"""Rows are padded to this many tokens, or to twice, four times, ... as many: few programs."""


class ScalarModel:
    """Reads prompt and answer; its value is the head times the last token's hidden state.

        r = w . h_n,   h after the final norm, n the end-of-sentence token; of an answer that has
                       none, the last token

    The head is the tensor `weight` [1, hidden] in `reward_head.safetensors`, as a linear layer
    with one output is stored. No text of the model is evaluated here, so there is no jail.
    """

    def __init__(self, config: ModelReward):
        """Load it.

        Raises:
            UserError: there is no model, no tokenizer or no head, or the head does not fit.
        """
        file = as_path(config.checkpoint) / HEAD
        if not file.is_file():
            raise UserError(
                f"the reward 'model': {file}: no such file; it holds the head, a tensor 'weight' "
                f"of shape [1, hidden]{hub_hint(config.checkpoint)}"
            )
        tensors = read_header(file)
        self._tokenizer = load_tokenizer(config.checkpoint)
        self._model = load(config.checkpoint)
        expected = (1, self._model.config.hidden_size)
        found = {name: entry.shape for name, entry in tensors.items()}
        if found != {"weight": expected}:
            raise UserError(f"{file}: holds {found}; expected one tensor 'weight' {expected}")
        self._head = jnp.asarray(tensors["weight"].read()[0].astype(np.float32))
        self._batch_size = config.batch_size
        self._values = jax.jit(_values)

    def __call__(self, answers: Sequence[Answer]) -> list[Value]:
        """Values of all; one that is no number is a failure of the model, and worth 0."""
        rows = [self._tokens(answer) for answer in answers]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        values = [Value(0.0)] * len(rows)
        for begin in range(0, len(rows), self._batch_size):
            batch = order[begin : begin + self._batch_size]
            found = self._run([rows[place] for place in batch])
            for place, value in zip(batch, found, strict=True):
                known = bool(np.isfinite(value))
                values[place] = Value(float(value)) if known else Value(0.0, "refused: no number")
        return values

    def _tokens(self, answer: Answer) -> list[int]:
        """Prompt and answer as the model would have read them, within what it can read."""
        tokens = encode_with_added_tokens(self._tokenizer, answer.prompt + answer.text)
        if not answer.truncated and self._tokenizer.eos_id is not None:
            tokens.append(self._tokenizer.eos_id)
        return tokens[-self._model.config.max_position_embeddings :]

    def _run(self, rows: list[list[int]]) -> np.ndarray:
        longest = max(map(len, rows))
        length = _SHORTEST
        while length < longest:
            length *= 2
        tokens = np.zeros((self._batch_size, length), np.int32)
        last = np.zeros(self._batch_size, np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = row
            last[place] = max(len(row) - 1, 0)
        return np.asarray(self._values(self._model, self._head, tokens, last))[: len(rows)]


def _values(model: Any, head: jax.Array, tokens: jax.Array, last: jax.Array) -> jax.Array:
    """float32 [batch]. What stands behind a row's last token is not seen by it."""
    hidden = model(tokens).hidden
    ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return ends.astype(jnp.float32) @ head
