"""Whether two answers are the same, where a comparison of text or of digits would be wrong."""

import pytest

from dsjax.rewards.equality import decide, verify


def is_same(expected: str, found: str) -> bool:
    decided = decide(expected, found)
    return verify(expected, found) if decided is None else decided


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("1/3", "0.333333"),
        (r"0.\overline{3}", r"\frac13"),
        ("113", "m + n = 110 + 3 = 113"),
        ("7", "f(2) = 7"),
        ("60", r"\angle ABC = 60^\circ"),
        ("y = 2x + 3", "2x - y + 3 = 0"),
        ("x + y = 5", "y + x = 5"),
        ("1,-2", "x = 1, x = -2"),
        (r"1.6 \times 10^{-19}", "1.6e-19"),
        ("2:3", "2:3"),
        ("2516_8", "2516_{8}"),
        (r"\infty", r"\infty"),
        (r"12 \text{ square feet}", r"12 \text{ ft}^2"),
        (r"25 \text{ m/s}", "25 meters per second"),
        (r"12.5\%", "12.5"),
        ("90", r"90^\circ"),
    ],
)
def test_the_same_answer_in_another_spelling(expected: str, found: str):
    assert is_same(expected, found)


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("1/3", "0.33"),
        ("0", r"0.\overline{3}"),
        ("0", "x^2 - 4 = 0"),
        ("5", "x + 1 = 5"),
        ("x + y = 5", "x - y = 5"),
        ("x + y = 5", "5"),
        ("x = 5", "y = 5"),
        (r"5x^2 - 2x + 1 = 0", r"\emptyset"),
        (r"1.6 \times 10^{-19}", "0"),
        (r"1.6 \times 10^{-19}", r"9.1 \times 10^{-31}"),
        (r"\pi \times 10^{-8}", "0"),
        ("1234567", "1234568"),
        ("2:3", "3:2"),
        ("52_8", "52_7"),
        ("1,-2", "(-2,1)"),
        (r"\{2,4,6\}", r"\{2,4,6,\ldots\}"),
        ("11", "1 1"),
        ("5", "5 thousand"),
        ("100", "100 minus 1"),
        (r"\text{odd}", r"\text{not odd}"),
    ],
)
def test_another_answer_that_looks_like_it(expected: str, found: str):
    assert not is_same(expected, found)


@pytest.mark.parametrize(
    "found", ["9" * 2000, "10^{999999999}", "9^{999}", "1e999", "\\frac{" * 300]
)
def test_no_number_is_too_long(found: str):
    assert decide("5", found) is not True
