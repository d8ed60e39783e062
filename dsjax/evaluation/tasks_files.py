"""Data sets that are read from a path: questions with a formula, a number or a letter for answer.

Each is read as it is published; the docstrings say where. The prompts are those of DeepSeek-R1's
README for mathematics, and of OpenAI's simple-evals for multiple choice.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsjax.data.records import Row, column, read_rows
from dsjax.errors import UserError
from dsjax.evaluation.task import BOXED, Question, Task
from dsjax.evaluation.tasks_made import is_answer
from dsjax.rewards.extraction import final_formula, final_number
from dsjax.rewards.letters import final_letter

CHOICE = """\
Answer the following multiple choice question. The last line of your response should be of the \
following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step \
by step before answering.

{question}

{choices}"""


def math500(path: Path) -> Task:
    """MATH-500 (HuggingFaceH4/MATH-500, test.jsonl): problem, answer, unique_id."""
    return Task("math500", _questions(path, _problem), "math", final_formula)


def aime(path: Path) -> Task:
    """A year of AIME, as any of its copies has it: problem or question, answer; id."""
    return Task("aime", _questions(path, _integer_problem), is_answer, final_number)


def gpqa(path: Path) -> Task:
    """GPQA (gpqa_diamond.csv): Question, Correct Answer, Incorrect Answer 1 to 3, Record ID.

    The choices are shuffled, in an order that depends on the question alone.
    """
    return Task("gpqa", _questions(path, _gpqa), is_answer, _letter("ABCD"))


def mmlu(path: Path) -> Task:
    """MMLU: cais/mmlu (question, choices, answer from 0, subject), or CSV.

    The CSV is the original's, without titles (question, four choices, letter), or that of
    simple-evals (Question, A, B, C, D, Answer, Subject).
    """
    return Task("mmlu", _questions(path, _mmlu), is_answer, _letter("ABCD"))


def mmlu_pro(path: Path) -> Task:
    """MMLU-Pro (TIGER-Lab/MMLU-Pro): question, options (at most ten), answer, question_id."""
    return Task("mmlu-pro", _questions(path, _mmlu_pro), is_answer, _letter("ABCDEFGHIJ"))


def _letter(letters: str) -> Callable[[str], str | None]:
    return partial(final_letter, letters=letters)


_AIME_ANSWER = re.compile(r"(\d{1,3})(?:\.0)?(?:\^\{?\\circ\}?|°)?")
"""One of 2025's is an angle, and written as such in some copies."""

Parsed = tuple[str | None, str, dict[str, Any]]
"""An id if the data set has one, the prompt, the example."""


def _questions(path: Path, parse: Callable[[Row], Parsed]) -> tuple[Question, ...]:
    return make_questions(path, read_rows(path), parse)


def make_questions(
    path: Path, rows: Iterable[tuple[str, Row]], parse: Callable[[Row], Parsed]
) -> tuple[Question, ...]:
    """Questions of rows; one without an id has its place, one whose id stands twice is refused.

    Raises:
        UserError: a row lacks something, or there is no row; the message says which and where.
    """
    found: dict[str, Question] = {}
    for place, (where, row) in enumerate(rows):
        try:
            own, prompt, example = parse(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        name = str(place) if own is None else own
        if name in found:
            raise UserError(f"{where}: the id {name!r} stands in an earlier row too")
        found[name] = Question(name, prompt, example)
    if not found:
        raise UserError(f"{path}: holds no rows")
    return tuple(found.values())


def _problem(row: Row) -> Parsed:
    name = row.get("unique_id")
    prompt = f"{column(row, 'problem', 'question')}\n\n{BOXED}"
    return None if name is None else str(name), prompt, {"answer": str(column(row, "answer"))}


def _integer_problem(row: Row) -> Parsed:
    text = str(column(row, "answer")).strip()
    found = _AIME_ANSWER.fullmatch(text)
    if found is None:
        raise UserError(f"answer is {text[:40]!r}; expected an integer from 0 to 999")
    answer = str(int(found[1]))
    return None, f"{column(row, 'problem', 'question')}\n\n{BOXED}", {"answer": answer}


def _choice(question: str, choices: Sequence[str], answer: int) -> tuple[str, dict[str, Any]]:
    """A prompt with lettered choices, and the letter of the right one."""
    letters = string.ascii_uppercase[: len(choices)]
    if not 0 <= answer < len(choices):
        raise UserError(f"the answer is number {answer} of {len(choices)} choices")
    listed = "\n".join(f"{a}) {text}" for a, text in zip(letters, choices, strict=True))
    prompt = CHOICE.format(letters=letters, question=question, choices=listed)
    return prompt, {"answer": letters[answer]}


def _gpqa(row: Row) -> Parsed:
    question = str(column(row, "question")).strip()
    wrong = [str(column(row, f"incorrect_answer_{n}")).strip() for n in (1, 2, 3)]
    right = str(column(row, "correct_answer")).strip()
    order = random.Random(f"gpqa {question}").sample(range(4), 4)
    choices = [[right, *wrong][place] for place in order]
    name = row.get("Record ID")
    return name, *_choice(question, choices, order.index(0))


def _mmlu(row: Row) -> Parsed:
    if "0" in row:  # the original, without titles
        question, *choices, answer = (row[str(n)] for n in range(6) if str(n) in row)
    elif "choices" in row:
        question, choices, answer = (column(row, n) for n in ("question", "choices", "answer"))
    else:
        question, *choices, answer = (column(row, n) for n in ("question", *"abcd", "answer"))
    place = answer if isinstance(answer, int) else "ABCD".find(str(answer).strip() or "-")
    if len(choices) != 4:
        raise UserError(f"expected four choices, found {len(choices)}")
    return None, *_choice(str(question), list(map(str, choices)), place)


def _mmlu_pro(row: Row) -> Parsed:
    options = column(row, "options")
    if not isinstance(options, list) or not 2 <= len(options) <= 10:
        raise UserError("options: expected a list of two to ten")
    answer = str(column(row, "answer"))
    place = string.ascii_uppercase.find(answer) if len(answer) == 1 else -1
    prompt, example = _choice(str(column(row, "question")), list(map(str, options)), place)
    return str(column(row, "question_id")), prompt, example
