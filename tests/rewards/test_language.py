"""The share of words in the target language."""

import pytest

from dsjax.config_rewards import LanguageReward
from dsjax.rewards.answer import Answer
from dsjax.rewards.language import language, prose


def share(text: str, target: str) -> float:
    return language(LanguageReward(language=target), Answer("", text, 1, False, {}))


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("so the answer must be even", "en", 1.0),
        ("so the 答案 must be even", "en", 5 / 7),
        ("我们知道答案", "zh", 1.0),
        ("我们知道 the answer", "zh", 4 / 6),
        ("значит ответ чётный", "ru", 1.0),
        ("значит the ответ", "ru", 2 / 3),
        ("これは本です", "ja", 1.0),
        ("답은 짝수 입니다", "ko", 1.0),
        ("naïve cafe\u0301", "fr", 1.0),  # an accent apart is of its letter
        ("", "en", 0.0),
        ("42 + 1 = 43", "en", 0.0),
        ("слово words", "th", 0.0),
        ("Թարգմանություն words", "en", 0.5),  # a script that no language here has
    ],
)
def test_words_are_told_apart_by_their_script(text: str, target: str, expected: float):
    assert share(text, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "文字 `print(x)` 文字",
        "文字 $x = \\frac{mass}{time}$ 文字",
        "文字 \\(speed\\) 文字 \\[speed\\] 文字 $$speed$$",
        "文字\n```python\nfor item in items: print(item)\n```\n文字",
        "<think>文字</think> https://example.org/page \\alpha x y n",
        "文字 ```python\nnever closed",
    ],
)
def test_code_formulas_addresses_and_symbols_are_no_words(text: str):
    assert share(text, "zh") == 1.0


def test_a_price_is_no_formula():
    assert "dollars and cents" in prose("it costs $5\nand many dollars and cents, $6")


def test_a_line_names_its_own_language():
    answer = Answer("", "слово", 1, False, {"language": "ru"})
    assert language(LanguageReward(language="en"), answer) == 1.0


def test_no_text_takes_long():
    for text in ("`" * 100_001, "$a\n" * 50_000, "\\(" * 50_000, "́" * 100_000):
        assert share(text, "en") == 0.0
