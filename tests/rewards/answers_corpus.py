"""Final answers as reasoning models write them, each labelled right or wrong, and their scores.

`python tests/rewards/answers_corpus.py` prints, for each kind, how many right answers get a reward
and how many wrong ones do: by the reward function, and by the grader that evaluation uses.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.config_rewards import ChoiceReward, CodeReward, MathReward
from dsjax.rewards.answer import Answer, final_answer
from dsjax.rewards.extraction import final_number, final_words
from dsjax.rewards.letters import final_letter
from dsjax.rewards.score import Scorer

CORPUS = Path(__file__).with_name("corpus")
KINDS = tuple(sorted(path.stem for path in CORPUS.glob("*.jsonl")))
REWARDS = {"letters": ChoiceReward, "code": CodeReward}
"""By kind; all others are scored by `math`."""


class Line(NamedTuple):
    """One answer of the corpus."""

    kind: str
    example: Mapping[str, Any]
    """The prompt file's line: "answer", and what the reward needs besides."""
    text: str
    right: bool

    @property
    def answer(self) -> Answer:
        """As a reward sees it."""
        return Answer("Q", self.text, 9, False, self.example)


class Score(NamedTuple):
    """What the two ways of scoring make of one line."""

    line: Line
    reward: float
    graded: bool
    """By the reader of evaluation's tasks; where they call the reward, the same."""
    reason: str


def load(kinds: tuple[str, ...] = KINDS) -> list[Line]:
    """Read the lines of these kinds."""
    return [
        Line(kind, **json.loads(line))
        for kind in kinds
        for line in (CORPUS / f"{kind}.jsonl").read_text().splitlines()
    ]


def score(lines: list[Line], workers: int = 2) -> list[Score]:
    """Score them all, in one batch for each reward."""
    scores = {}
    for reward in (MathReward, ChoiceReward, CodeReward):
        mine = [line for line in lines if REWARDS.get(line.kind, MathReward) is reward]
        with Scorer([reward()], workers=workers) as scorer:
            results = scorer.score([line.answer for line in mine])
        for line, result in zip(mine, results, strict=True):
            graded = _grade(line, result.total == 1)
            reason = result.reasons.get(reward().name, "")
            scores[id(line)] = Score(line, result.total, graded, reason)
    return [scores[id(line)] for line in lines]


def _grade(line: Line, reward: bool) -> bool:
    text = final_answer(line.answer)
    if line.kind == "letters":
        letter = final_letter(text or "", line.example["choices"])
        return letter == line.example["answer"]
    reader = {"integers": final_number, "decimals": final_number, "text": final_words}
    if line.kind not in reader:
        return reward
    gold = reader[line.kind](f"\\boxed{{{line.example['answer']}}}")
    return text is not None and reader[line.kind](text) == gold


def table(scores: list[Score]) -> str:
    """Right answers with a reward and wrong ones with a reward, by kind, as text."""
    rows = [f"{'kind':22}{'right: reward':>16}{'graded':>12}{'wrong: reward':>16}{'graded':>12}"]
    for kind in dict.fromkeys(score.line.kind for score in scores):
        cells = []
        for right in (True, False):
            mine = [s for s in scores if s.line.kind == kind and s.line.right is right]
            cells.append(f"{sum(s.reward == 1 for s in mine):>10} of {len(mine)}")
            cells.append(f"{sum(s.graded for s in mine):>6} of {len(mine)}")
        rows.append(f"{kind:22}{cells[0]:>16}{cells[1]:>12}{cells[2]:>16}{cells[3]:>12}")
    return "\n".join(rows)


if __name__ == "__main__":
    import sys

    measured = score(load(tuple(sys.argv[1:]) or KINDS))
    for one in measured:
        if (one.reward == 1, one.graded) != (one.line.right, one.line.right):
            print(one.line.kind, "right" if one.line.right else "WRONG", one.reward, one.graded,
                  one.reason, one.line.example.get("answer"), repr(one.line.text))  # fmt: skip
    print(table(measured))
