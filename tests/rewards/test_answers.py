"""The corpus of final answers: what rewards and evaluation's graders make of it."""

from collections import Counter

import answers_corpus
import pytest

LINES = answers_corpus.load()


@pytest.fixture(scope="module")
def scores() -> list[answers_corpus.Score]:
    return answers_corpus.score(LINES)


def test_the_corpus_has_enough_answers_of_each_kind():
    kinds = Counter(line.kind for line in LINES)
    assert len(kinds) == 9 and min(kinds.values()) >= 40
    assert sum(line.right for line in LINES) >= 200 <= sum(not line.right for line in LINES)
    assert len({(line.text, str(line.example)) for line in LINES}) == len(LINES)


@pytest.mark.parametrize("kind", answers_corpus.KINDS)
def test_no_wrong_answer_gets_a_reward(kind: str, scores: list[answers_corpus.Score]):
    wrong = [score for score in scores if score.line.kind == kind and not score.line.right]
    assert [s.line for s in wrong if s.reward != 0 or s.graded] == []


@pytest.mark.parametrize("kind", answers_corpus.KINDS)
def test_right_answers_get_a_reward(kind: str, scores: list[answers_corpus.Score]):
    right = [score for score in scores if score.line.kind == kind and score.line.right]
    missed = [s.line for s in right if s.reward != 1 or not s.graded]
    assert len(missed) <= 0.02 * len(right), missed


def test_no_expected_answer_is_unreadable(scores: list[answers_corpus.Score]):
    assert [s.line for s in scores if s.reason.startswith("refused")] == []
