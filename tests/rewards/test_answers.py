"""The corpus of final answers: its size, and what rewards and graders make of it."""

from collections import Counter

import answers_corpus

LINES = answers_corpus.load()


def test_the_corpus_has_enough_answers_of_each_kind():
    kinds = Counter(line.kind for line in LINES)
    assert len(kinds) == 9 and min(kinds.values()) >= 40
    assert sum(line.right for line in LINES) >= 200 <= sum(not line.right for line in LINES)
    assert len({(line.text, str(line.example)) for line in LINES}) == len(LINES)
