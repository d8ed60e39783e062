"""pass@1, cons@k and their intervals."""

import numpy as np
import pytest

from dsjax.evaluation.statistics import Grade, bootstrap, majority, score_task


def grades(votes: str, answer: str = "a") -> list[Grade]:
    """A sample for each character; `-` has no answer."""
    return [Grade(v == answer, None if v == "-" else v, 10, v == "-") for v in votes]


def test_pass_at_1_is_the_mean_over_samples_and_cons_the_majority():
    score = score_task([grades("aab-"), grades("bbba"), grades("----")], votes=True, failures={})
    assert score.pass_at_1.value == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert score.cons_at_k is not None and score.cons_at_k.value == pytest.approx(1 / 3)
    assert score.pass_at_k.value == pytest.approx(2 / 3)
    assert (score.questions, score.k, score.mean_tokens) == (3, 4, 10)
    assert score.answered == pytest.approx(7 / 12)
    assert score.truncated == pytest.approx(5 / 12)


def test_answers_without_votes_have_no_majority():
    assert score_task([grades("ab")], votes=False, failures={}).cons_at_k is None


@pytest.mark.parametrize(
    ("votes", "right"),
    [("aab", True), ("abb", False), ("ab", True), ("ba", False), ("---a", True), ("--", False)],
)
def test_no_answer_is_no_vote_and_of_equals_the_first_counts(votes, right):
    assert majority(grades(votes)) is right


def test_the_interval_is_that_of_the_binomial():
    """For 400 questions, half of them right, the standard error is 0.025."""
    found = bootstrap(np.repeat([0.0, 1.0], 200))
    assert found.value == 0.5
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    found = [bootstrap(rng.binomial(8, 0.3, size=60) / 8) for _ in range(120)]
    covered = np.mean([one.low <= 0.3 <= one.high for one in found])
    assert 0.88 <= covered <= 1


def test_more_questions_than_are_drawn_at_a_time(monkeypatch):
    values = np.linspace(0, 1, 50)
    whole = bootstrap(values)
    monkeypatch.setattr("dsjax.evaluation.statistics._AT_ONCE", 70)
    assert bootstrap(values) == whole
