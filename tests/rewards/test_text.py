"""What rewards of text alone say: exact match, a chosen letter, the format, the length."""

import random

import pytest

from dsjax.config_rewards import ChoiceReward, ExactReward, FormatReward, LengthReward
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.code_blocks import final_program
from dsjax.rewards.equality import decide
from dsjax.rewards.extraction import final_value
from dsjax.rewards.text import choice, exact, format_, length

PROMPTS = ["Q", "Q<think>\n"]


def answer(text: str, prompt: str = "Q", truncated: bool = False, tokens: int = 9, **example):
    return Answer(prompt, text, tokens, truncated, example)


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("42", "Q", "42"),
        ("<think>\nhm\n</think>\n\n42\n", "Q", "42"),
        ("hm</think>42", "Q<think>\n", "42"),
        ("\n <think>\nhm</think>42", "Q", "42"),
        ("\n<think>\nhm</think>42", "Q<think>\n", "42"),  # opened once more
        ("<think>a</think>b</think> 42", "Q", "b</think> 42"),  # the first ends it
        ("hm</think>42", "Q", "hm</think>42"),  # nothing has opened it
        ("<think>hm</think>", "Q", ""),
        ("<think>hm</think><answer> 42 </answer>", "Q", "42"),
        ("hm, 42", "Q<think>\n", None),
        ("<think>42", "Q", None),
        ("<think>hm</think>42 <think>no", "Q", "42 <think>no"),
    ],
)
def test_the_answer_is_what_follows_the_thought(text: str, prompt: str, expected: str | None):
    assert final_answer(answer(text, prompt)) == expected


def test_a_truncated_text_has_no_answer():
    assert final_answer(answer("42", truncated=True)) is None
    assert exact(ExactReward(), answer("42", truncated=True, answer="42")) == 0


def test_exact_is_equal_but_for_blanks_around():
    assert exact(ExactReward(), answer("<think>\n</think>\n\nParis \n", answer="Paris")) == 1
    assert exact(ExactReward(), answer("Paris.", answer="Paris")) == 0
    assert exact(ExactReward(), answer("7", answer=7)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "(C)",
        "**C**",
        "C. Because it is.",
        "The answer is C",
        "The answer is (C).",
        "Answer: **C**",
        "**Answer:** C",
        "the correct option is C",
        "My answer: option C",
        r"So \boxed{C}.",
        r"So \boxed{\text{(C)}}",
        r"Answer: $\boxed{C}$",
        "A is wrong, so the answer is B. No wait: the answer is C",
        "Answer: B\n\nOn reflection, \\boxed{C}",
        "A. is false\nB. is false\nC. is true",
    ],
)
def test_a_letter_is_found_in_its_common_spellings(text: str):
    example = {"choices": ["w", "x", "y", "z"]}
    assert choice(ChoiceReward(), answer(text, answer="C", **example)) == 1
    assert choice(ChoiceReward(), answer(text, answer="B", **example)) == 0


@pytest.mark.parametrize("text", ["", "Cats", "The answer is Cats", "I say nothing", "c", "E"])
def test_what_is_no_choice_is_none(text: str):
    for letter in "ABCD":
        assert choice(ChoiceReward(), answer(text, answer=letter, choices="ABCD")) == 0


@pytest.mark.parametrize(
    ("prompt", "text", "plain", "tagged"),
    [
        ("Q", "<think>a</think>b", 1, 0),
        ("Q<think>\n", "a</think>b", 1, 0),
        ("Q", "<think>a</think> <answer>b</answer>", 1, 1),
        ("Q<think>\n", "a</think>\n<answer>b</answer>\n", 1, 1),
        ("Q<think>\n", "<think>a</think>b", 0, 0),  # opened twice
        ("Q", "a</think>b", 0, 0),
        ("Q", "<think>a", 0, 0),
        ("Q", "b", 0, 0),
        ("Q", "<think>a</think>", 0, 0),  # no answer
        ("Q", "well <think>a</think>b", 0, 0),
        ("Q", "</think>a<think>b", 0, 0),
        ("Q", "<think>a</think>b</think>c", 0, 0),
        ("Q", "<think>a</think><answer></answer>", 1, 0),
        ("Q", "<think>a</think>so <answer>b</answer>", 1, 0),
        ("Q", "<think>a</think><answer>b</answer><answer>c</answer>", 1, 0),
        ("Q", "<think><answer>b</answer></think>c", 1, 0),
    ],
)
def test_tags_stand_each_once_and_in_order(prompt: str, text: str, plain: int, tagged: int):
    assert format_(FormatReward(), answer(text, prompt)) == plain
    assert format_(FormatReward(answer_tags=True), answer(text, prompt)) == tagged
    assert format_(FormatReward(), answer(text, prompt, truncated=True)) == 0


def test_what_has_the_format_is_split_by_the_reasoning_parser_as_by_its_tags():
    draw = random.Random(0)
    pieces = ["<think>", "</think>", "\n", " ", "a", "b"]
    well_formed = 0
    for _ in range(4000):
        text, prompt = "".join(draw.choices(pieces, k=draw.randrange(9))), draw.choice(PROMPTS)
        if format_(FormatReward(), answer(text, prompt)):
            well_formed += 1
            assert final_answer(answer(text, prompt)) == text.partition("</think>")[2].strip()
    assert well_formed > 100


def test_overlong_answers_lose_by_dapos_equation():
    config = LengthReward(limit=100, margin=20)
    worth = [length(config, answer("", tokens=n)) for n in (0, 80, 85, 90, 100, 500)]
    assert worth == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_the_last_python_block_is_the_code():
    fence = "```"
    blocks = [("python", "a"), ("py", "b"), ("", "plain"), ("sh", "c")]
    text = "\n".join(f"{fence}{name}\n{code}\n{fence}" for name, code in blocks)
    assert final_program(text) == "b\n"
    assert final_program(f"{fence}\nplain\n{fence}") == "plain\n"
    assert final_program(f"{fence}python\nnever closed") == "never closed\n"
    assert final_program("none") is None


HOSTILE = (
    "```" + " " * 200_000, "\\boxed{" * 50_000, "answer is " * 50_000, "> " * 100_000,
    "$1 " * 50_000, "> ```\n" * 50_000, "so \\boxed{1} or " * 20_000,
    "answer is " + "1,111" * 50_000, "answer: " + "5 m " * 50_000, "pick option A or " * 20_000,
    "\\text{" * 50_000, "A\n" * 100_000,
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_takes_long(text: str):
    """Patterns that try everything twice would take hours."""
    final_program(text, ["f"])
    value = final_value(text)
    assert value is None or decide("5 cm", value) is not True
    assert choice(ChoiceReward(), answer(text, answer="B", choices="AB")) == 0
    assert format_(FormatReward(), answer(text)) == 0
