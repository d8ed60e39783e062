"""Rows of whole conversations: every one in every epoch, in any order, from any position."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dsjax.data.answer_rows import (
    AnswerRows,
    EpochRows,
    Examples,
    fill_rows,
    held_out_answers,
    make_examples,
)
from dsjax.data.answers import AnswerEncoder, Example
from dsjax.data.chat_template import make_chat_template
from dsjax.data.conversations import read_conversation
from dsjax.errors import UserError
from tests.data.spoken import tokenizer
from tests.data.test_answers import PLAIN, said

LENGTH, EPOCHS, SIZE = 48, 2, 4
SAID = [said(f"hi {n}" + " it" * (n % 5), "no" * (1 + n % 3)) for n in range(50)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    template = make_chat_template(PLAIN, tokenizer(), tmp_path_factory.mktemp("none"))
    return AnswerEncoder(template, tokenizer(), "all")


@pytest.fixture(scope="module")
def examples(encoder):
    return make_examples([read_conversation(one, "here") for one in SAID], encoder, LENGTH)[0]


def iterator(examples, rows=tuple(range(SIZE)), seed=0):
    return AnswerRows(
        examples, epochs=EPOCHS, microbatch_size=SIZE, rows=rows, row_length=LENGTH, seed=seed
    )


def everything(data, count):
    batches = [next(data) for _ in range(count)]
    data.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def segments(rows, first, last):
    """Every example of these rows, as (its tokens, what is trained of it)."""
    found = []
    for tokens, ids, trained in zip(*(rows[name][first:last] for name in rows), strict=True):
        for segment in range(1, ids.max(initial=0) + 1):
            here = ids == segment
            found.append((tuple(tokens[here].tolist()), tuple(trained[here].tolist())))
    return found


def test_every_example_comes_once_an_epoch_whole_and_in_a_new_order(examples):
    per_epoch = EpochRows(examples.lengths, LENGTH, 0).rows_per_epoch
    rows = everything(iterator(examples), -(-EPOCHS * per_epoch // SIZE) + 1)
    want = sorted((tuple(e.tokens.tolist()), tuple(e.trained.tolist())) for e in examples)
    epochs = [segments(rows, e * per_epoch, (e + 1) * per_epoch) for e in range(EPOCHS)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == want
    assert epochs[0] != epochs[1]
    beyond = rows["segment_ids"][EPOCHS * per_epoch :]
    assert len(beyond) > 0 and not beyond.any()


def test_a_position_is_taken_up_again_exactly(examples):
    data = iterator(examples)
    for _ in range(3):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    want = everything(data, 4)
    again = iterator(examples)
    again.set_state(state)
    for name, array in everything(again, 4).items():
        np.testing.assert_array_equal(array, want[name])
    with pytest.raises(UserError, match="seed was 0, is 1"):
        iterator(examples, seed=1).set_state(state)
    with pytest.raises(UserError, match="examples was"):
        iterator(Examples(list(examples)[1:])).set_state(state)


def test_processes_that_read_some_rows_each_read_what_one_reads(examples):
    whole = everything(iterator(examples), 3)
    parts = [everything(iterator(examples, rows=r), 3) for r in ((0, 2), (1, 3))]
    for name, array in whole.items():
        cut = array.reshape(3, SIZE, LENGTH)
        for rows, part in zip(((0, 2), (1, 3)), parts, strict=True):
            np.testing.assert_array_equal(cut[:, rows], part[name].reshape(3, 2, LENGTH))


def test_an_example_that_fits_into_no_row_is_left_out_whole(encoder):
    short, long = (read_conversation(said("hi", "no" * n), "here") for n in (1, 60))
    found, left_out = make_examples([short, long], encoder, LENGTH)
    assert (len(found), left_out) == (1, 1)
    with pytest.raises(UserError, match="sequence_length=48: all 1 examples are longer"):
        make_examples([long], encoder, LENGTH)


def test_held_out_answers_are_scored_where_they_are_predicted(examples):
    rows = held_out_answers(examples, tokenizer(), LENGTH)
    assert rows.scored.sum() == sum(int(e.trained.sum()) for e in examples)
    predicted = np.roll(rows.tokens, -1, axis=1)[rows.scored]
    want = np.concatenate([e.tokens[e.trained] for e in examples])
    assert sorted(predicted.tolist()) == sorted(want.tolist())
    assert rows.num_bytes == sum(len(one["messages"][1]["content"]) for one in SAID)


def test_padding_is_a_place_not_a_token():
    """Rows of eos alone, which is also what pads: what is trained is told by places."""
    eos = Example(np.zeros(3, np.int32), np.array([False, True, True]))
    batch = fill_rows([[eos, eos], []], 8)
    assert batch["trained"].tolist() == [[False, True, True, False, True, True, False, False],
                                         [False] * 8]  # fmt: skip
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
