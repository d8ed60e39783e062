"""Documents packed into a row are computed as if each were alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.transformer import Transformer

from .conftest import LENGTH, Forward, forward, off, random_tokens

EXACT = 1e-5

ROWS = ((20, 15, 8), (30, 18))
"""Lengths of the documents in each row; the first row ends in padding."""


def pack(rows: tuple[tuple[np.ndarray, ...], ...]) -> tuple[jax.Array, jax.Array]:
    tokens, segments = np.zeros((2, len(rows), LENGTH), np.int32)
    for row, documents in enumerate(rows):
        end = 0
        for number, document in enumerate(documents, start=1):
            begin, end = end, end + len(document)
            tokens[row, begin:end], segments[row, begin:end] = document, number
    return jnp.asarray(tokens), jnp.asarray(segments)


@pytest.fixture(scope="module")
def documents(model: Transformer) -> list[tuple[np.ndarray, ...]]:
    return [
        tuple(random_tokens(model.config, (size,), seed=10 * row + size) for size in sizes)
        for row, sizes in enumerate(ROWS)
    ]


@pytest.fixture(scope="module")
def packed(model: Transformer, documents: list[tuple[np.ndarray, ...]]) -> Forward:
    tokens, segments = pack(tuple(documents))
    return forward(model, tokens, None, segments)


@pytest.fixture(scope="module")
def alone(model: Transformer, documents: list[tuple[np.ndarray, ...]]) -> list[Forward]:
    """Each document in a batch of its own, whose second row is all padding."""
    result = []
    for document in (d for row in documents for d in row):
        tokens, segments = pack(((document,), ()))
        result.append(forward(model, tokens, None, segments))
    return result


def places() -> list[tuple[int, int, int]]:
    """Row, begin and size of each document."""
    begins = [np.cumsum((0, *sizes[:-1])) for sizes in ROWS]
    return [
        (row, int(begin), size)
        for row, sizes in enumerate(ROWS)
        for begin, size in zip(begins[row], sizes, strict=True)
    ]


def test_packed_hidden_states_equal_separate_ones(packed: Forward, alone: list[Forward]) -> None:
    for (row, begin, size), own in zip(places(), alone, strict=True):
        assert off(packed.hidden[row, begin : begin + size], own.hidden[0, :size]) < EXACT


def test_packed_mtp_equals_separate_where_a_target_exists(
    packed: Forward, alone: list[Forward]
) -> None:
    for (row, begin, size), own in zip(places(), alone, strict=True):
        found = packed.mtp_hidden[0][row, begin : begin + size - 1]
        assert off(found, own.mtp_hidden[0][0, : size - 1]) < EXACT


def test_packed_loads_are_the_sum_of_separate_ones(packed: Forward, alone: list[Forward]) -> None:
    assert (packed.load == sum(own.load for own in alone)).all()
    assert (packed.mtp_load == sum(own.mtp_load for own in alone)).all()


def test_padding_is_not_counted(model: Transformer, packed: Forward, alone: list[Forward]) -> None:
    tokens_of_row = np.array([sum(sizes) for sizes in ROWS])
    choices = model.config.num_experts_per_tok
    assert (packed.load.sum(-1) == choices * tokens_of_row.sum()).all()
    # A token has an MTP target if its document goes on.
    targets = sum(size - 1 for sizes in ROWS for size in sizes)
    assert (packed.mtp_load.sum(-1) == choices * targets).all()


def test_a_row_of_padding_has_no_balance_loss(model: Transformer, tokens: jax.Array) -> None:
    """The mean over rows must not be pulled by rows that hold nothing."""
    segments = jnp.ones_like(tokens).at[1].set(0)
    one = forward(model, tokens, None, segments)
    both = forward(model, tokens.at[1].set(tokens[0]), None, jnp.ones_like(tokens))
    assert off(2 * one.balance_loss, both.balance_loss) < EXACT
