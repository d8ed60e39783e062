"""The final answer of a text, as models write it."""

import pytest

from dsjax.rewards.extraction import final_formula, final_number
from dsjax.rewards.letters import final_letter


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("It is \\boxed{12}.", "12"),
        ("Step 1: \\boxed{1}. So the answer is \\boxed{2}.", "2"),
        ("\\boxed{1} then \\boxed{2}", None),
        ("\\boxed{-7}", "-7"),
        ("\\boxed{x = 7}", "7"),
        ("\\boxed{1{,}234}", "1234"),
        ("\\boxed{\\$1,234.00}", "1234"),
        ("\\boxed{8.5}", "8.5"),
        ("\\boxed{007}", "7"),
        ("**Final Answer:** 3 apples", "3"),
        ("The answer is 12.", "12"),
        ("first 3, then 4", None),
        ("The answer is therefore 42, not 41.", "42"),
        ("The answer is $\\frac{84}{2} = 42$.", "42"),
        ("\\boxed{42}. (Twice 42 is 84.)", "42"),
        ("It is 2 1/2.\n\n#### 2 1/2", "2.5"),
        ("5-3 = 2", "2"),
        ("nothing", None),
        ("\\boxed{nothing}, not 3", None),
        ("\\boxed{12", None),  # cut off in its box
    ],
)
def test_numbers(text, vote):
    assert final_number(text) == vote


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("Answer: B", "B"),
        ("answer: (B)", "B"),
        ("**Answer: B**", "B"),
        ("Answer: B) DNA", "B"),
        ("Answer: A\nNo, wait. Answer: C", "C"),
        ("The correct answer is D.", "D"),
        ("\\boxed{\\text{C}}", "C"),
        ("\\boxed{C) 12}", "C"),
        ("DNA", None),
        ("Answer: E", None),
        ("I take B", "B"),
        ("Answer: The correct option is C", "C"),
        ("The answer is option (C), 5 m.", "C"),
        ("Since A, B and D are wrong, C is the answer.", "C"),
        ("Hence, option (D) is correct.", "D"),
        ("<b>Answer: B</b>", "B"),
        ("A or B is the answer.", None),
        ("Many pick A here.", None),
        ("Answer: B\n\nWait, actually it is C.", None),
        ("", None),
    ],
)
def test_letters(text, vote):
    assert final_letter(text, "ABCD") == vote


@pytest.mark.parametrize(
    "texts",
    [
        ("\\boxed{\\dfrac{1}{2}}", "\\boxed{\\frac{1}{2}}", "\\boxed{ \\tfrac{1}{2} }"),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "\\boxed{(3,\\frac{\\pi}{2})}"),
        ("\\boxed{\\text{Evelyn}}", "\\boxed{Evelyn}", "Answer: $Evelyn$."),
    ],
)
def test_a_formula_set_in_another_way_is_the_same_vote(texts):
    assert len({final_formula(text) for text in texts}) == 1


def test_formulas_that_differ_are_different_votes():
    found = [final_formula(f"\\boxed{{{x}}}") for x in ("x+1", "x-1", "(1,2)", "[1,2]", "12")]
    assert len(set(found)) == 5
    assert final_formula("There is neither a box nor anything else that says so.") is None
