"""Data sets are read as they are published."""

import csv
import json
from collections import Counter

import pytest

from dsjax.errors import UserError
from dsjax.evaluation.tasks import READ, open_tasks

AIME = [
    {"ID": "2024-II-4", "Problem": "Find x.", "Solution": "...", "Answer": 33},
    {"ID": "2024-II-5", "Problem": "Find y.", "Solution": "...", "Answer": "080"},
    {"ID": "2025-I-9", "Problem": "Find the angle.", "Solution": "...", "Answer": "336^\\circ"},
]
GPQA = [
    {
        "Question": f"Which particle is number {n}?\n",
        "Correct Answer": f"right {n} ",
        "Incorrect Answer 1": "wrong a",
        "Incorrect Answer 2": "wrong b",
        "Incorrect Answer 3": "wrong c",
        "Record ID": f"rec{n}",
        "Subdomain": "Physics",
    }
    for n in range(40)
]
CHOICES = ["one", "two", "three", "four"]
MMLU = [{"question": "What?", "subject": "law", "choices": CHOICES, "answer": 2}]
MMLU_PRO = [
    {
        "question_id": 70,
        "question": "Which?",
        "options": [f"option {n}" for n in range(10)],
        "answer": "J",
        "answer_index": 9,
        "category": "business",
    }
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_csv(path, rows, titles=None):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([titles, *rows] if titles else rows)
    return path


def read(name, path):
    [task] = open_tasks([f"{name}={path}"], None)
    return task


def judge(task, question, text) -> bool:
    vote = task.vote(text)
    return vote is not None and task.check(vote, question.example)


def test_aime(tmp_path):
    task = read("aime", write_jsonl(tmp_path / "aime.jsonl", AIME))
    assert [q.example for q in task.questions] == [{"answer": a} for a in ("33", "80", "336")]
    assert task.questions[0].prompt.startswith("Find x.\n\nPlease reason step by step")
    assert judge(task, task.questions[1], "\\boxed{080}")
    assert judge(task, task.questions[1], "\\boxed{80}")
    assert not judge(task, task.questions[1], "\\boxed{8}")


def test_gpqa_shuffles_by_the_question_alone(tmp_path):
    titles = list(GPQA[0])
    rows = [list(row.values()) for row in GPQA]
    task = read("gpqa", write_csv(tmp_path / "gpqa_diamond.csv", rows, titles))
    again = read("gpqa", write_csv(tmp_path / "other.csv", rows[::-1], titles))
    assert {q.id: q for q in task.questions} == {q.id: q for q in again.questions}
    for question, row in zip(task.questions, GPQA, strict=True):
        letter = question.example["answer"]
        assert f"{letter}) {row['Correct Answer'].strip()}\n" in question.prompt + "\n"
        assert judge(task, question, f"...\n\nAnswer: {letter}")
    places = Counter(q.example["answer"] for q in task.questions)
    assert set(places) == set("ABCD") and max(places.values()) < 20


def test_mmlu_in_its_three_forms_and_c_eval(tmp_path):
    simple = write_csv(
        tmp_path / "simple.csv",
        [[0, "What?", *CHOICES, "C", "law"]],
        ["", "Question", *"ABCD", "Answer", "Subject"],
    )
    (tmp_path / "original").mkdir()
    write_csv(tmp_path / "original" / "law_test.csv", [["What?", *CHOICES, "C"]])
    (tmp_path / "val").mkdir()
    titles = ["id", "question", *"ABCD", "answer", "explanation"]
    write_csv(tmp_path / "val" / "law_val.csv", [[0, "What?", *CHOICES, "C", ""]], titles)
    cais = write_jsonl(tmp_path / "cais.jsonl", MMLU)
    paths = (cais, simple, tmp_path / "original", tmp_path / "val")
    tasks = [read("mmlu", path) for path in paths]
    assert len({task.questions[0].digest for task in tasks}) == 1
    [question] = tasks[0].questions
    assert question.example == {"answer": "C"}
    assert question.prompt.endswith("What?\n\nA) one\nB) two\nC) three\nD) four")
    assert "one of ABCD" in question.prompt


def test_mmlu_pro(tmp_path):
    task = read("mmlu-pro", write_jsonl(tmp_path / "test.jsonl", MMLU_PRO))
    [question] = task.questions
    assert question.id == "70" and question.example == {"answer": "J"}
    assert "one of ABCDEFGHIJ" in question.prompt and "J) option 9" in question.prompt
    assert judge(task, question, "The answer is (J).")
    assert not judge(task, question, "Answer: A")


def test_parquet_is_read_like_json_lines(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in (("mmlu", MMLU), ("mmlu-pro", MMLU_PRO), ("gpqa", GPQA)):
        folder = tmp_path / name
        folder.mkdir()
        parquet.write_table(arrow.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet")
        lines = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        assert read(name, folder).questions == read(name, lines).questions


@pytest.mark.parametrize(
    ("name", "file", "content", "problem"),
    [
        ("aime", "a.jsonl", "", "holds no rows"),
        ("aime", "a.jsonl", '{"Answer": 3}\n', ":1: expected a column problem or question"),
        ("aime", "a.jsonl", '{"Problem": "x", "Answer": "1/2 or so"}\n', ":1: answer is '1/2"),
        ("aime", "a.jsonl", "{\n", "a.jsonl:1: not JSON"),
        ("aime", "a.jsonl", "[1]\n", ":1: a JSON list; expected an object"),
        ("aime", "a.json", "{}", "expected a list of objects, found dict"),
        ("aime", "a.txt", "x", "expected a name that ends with .jsonl"),
        ("aime", "a.parquet", "x", "a.parquet: cannot be read as parquet"),
        ("mmlu", "a.jsonl", json.dumps(MMLU[0] | {"answer": 4}), "answer is number 4 of 4"),
        ("mmlu", "a.jsonl", json.dumps(MMLU[0] | {"choices": ["a"]}), "expected four choices"),
        ("mmlu", "a.csv", "What?,1,2,3,4,E\n", "the answer is number -1 of 4"),
        ("mmlu-pro", "a.jsonl", json.dumps(MMLU_PRO[0] | {"options": []}), "options: expected a"),
        ("mmlu-pro", "a.jsonl", 2 * (json.dumps(MMLU_PRO[0]) + "\n"), "id '70' stands in an"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, file, content, problem):
    pytest.importorskip("pyarrow")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as caught:
        open_tasks([f"{name}={tmp_path / file}"], None)
    assert problem in str(caught.value)


def test_an_empty_folder_is_said(tmp_path):
    for name in READ:
        with pytest.raises(UserError, match=r"holds no file that ends with \.jsonl"):
            open_tasks([f"{name}={tmp_path}"], None)
