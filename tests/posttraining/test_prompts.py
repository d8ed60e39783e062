"""Questions: every one once an epoch, in a new order, and the held-out ones never."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dsjax.config_grpo import PromptsConfig
from dsjax.data.language import Language
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from dsjax.posttraining.prompts import Comparisons, Questions, open_questions
from tests.object_store import ObjectStore

RECORDS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(200)]
FRACTION = PromptsConfig(path="unused", held_out_fraction=0.1)


def test_an_epoch_asks_every_question_that_is_not_held_out_once() -> None:
    questions = Questions(RECORDS, FRACTION, seed=1)
    held_out = {record["prompt"] for record in questions.held_out(len(RECORDS))}
    assert 5 < len(held_out) < 40
    rest = len(RECORDS) - len(held_out)
    first, place = questions.training(0, rest)
    second, _ = questions.training(place, rest)
    for epoch in (first, second):
        asked = Counter(record["prompt"] for record in epoch)
        assert set(asked.values()) == {1} and not held_out & set(asked)
    assert first != second
    assert first != Questions(RECORDS, FRACTION, seed=2).training(0, rest)[0]


def test_questions_go_on_from_any_place() -> None:
    questions = Questions(RECORDS, FRACTION, seed=1)
    whole, end = questions.training(0, 50)
    first, place = questions.training(0, 20)
    rest, other = questions.training(place, 30)
    assert first + rest == whole and other == end


def test_the_same_questions_are_held_out_whatever_the_order() -> None:
    held = [
        {r["prompt"] for r in Questions(records, FRACTION, seed=seed).held_out(200)}
        for records, seed in ((RECORDS, 1), (RECORDS[::-1], 7))
    ]
    assert held[0] == held[1]


def test_comparisons_are_a_million_and_right() -> None:
    pairs = Comparisons()
    assert len(pairs) == 10**6
    assert pairs[0] == {"prompt": "000?000:", "answer": "="}
    assert pairs[999_998] == {"prompt": "999?998:", "answer": ">"}
    assert pairs[1] == {"prompt": "000?001:", "answer": "<"}
    assert len({pairs[n]["prompt"] for n in range(0, 10**6, 997)}) == len(range(0, 10**6, 997))


def test_a_text_is_put_into_the_template_and_special_tokens_are_read_out_of_it() -> None:
    tokenizer = train_tokenizer([], 261)
    eos = tokenizer.decode([1])
    config = PromptsConfig(path="unused", template=f"{eos}Q: {{prompt}} A:")
    questions = Questions(RECORDS, config, seed=0)
    language = Language(tokenizer, None, add_bos=True, home=None)
    tokens = questions.encode({"prompt": "7+1="}, language)
    assert tokens == (0, 1, *tokenizer.encode("Q: 7+1= A:"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "bucket"])
def test_files_hold_what_was_written(kind: str, store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / ("q.parquet" if kind == "parquet" else "q.jsonl")
    if kind != "parquet":
        path.write_text("".join(json.dumps(record) + "\n\n" for record in RECORDS))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    seen = []
    where = store.put_folder("data", tmp_path) + "/*.jsonl" if kind == "bucket" else str(path)
    config = PromptsConfig(path=where)
    questions = open_questions(config, lambda record, where: seen.append(where), 0)
    asked, _ = questions.training(0, len(RECORDS))
    assert sorted(r["answer"] for r in asked) == sorted(r["answer"] for r in RECORDS)
    assert len(seen) == len(set(seen)) == len(RECORDS)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q.xml").write_text("prompt\n")
    with pytest.raises(UserError, match=r"q.xml: expected a name that ends with .jsonl, "):
        open_questions(PromptsConfig(path=f"{tmp_path}/q.xml"), lambda *_: None, 0)
