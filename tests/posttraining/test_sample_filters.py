"""Which answers of rejection sampling are kept, and which reason the others are refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dsjax.posttraining.sample_filters import KEPT
from tests.evaluation.stand_ins import ScriptedEngine
from tests.posttraining.sampled import checkpoint as checkpoint
from tests.posttraining.sampled import lines, says, write_prompts
from tests.posttraining.sampled import run as run

PARAGRAPH = "so on and on, " * 6
ANSWERS = {
    "Two.</think>4": KEPT,
    "Two.</think>\n\n 4": "duplicate",
    "two.</think>  4": "duplicate",
    "Two!</think>4": KEPT,
    "Two again.</think>4": KEPT,
    "Two.</think>5": "wrong",
    "Two and two" * 30: "truncated",
    "Two and two": "unfinished thought",
    "Two и два, четыре.</think>4": "mixed language",
    "Two.\n```\n2 + 2\n```</think>4": "unreadable: code block in thought",
    f"{PARAGRAPH}</think>4": "unreadable: long paragraph",
    f"{PARAGRAPH[:40]}\n\n{PARAGRAPH[40:]}</think>4": KEPT,
    "\n\n".join(["I add two and two again."] * 9) + "</think>4": "unreadable: repetition",
    "Two.</think>Or not.</think>4": "wrong",
    "<think>Two, once more.</think>4": "unreadable: stray tag",
    "Two. <think> So.</think>4": "unreadable: stray tag",
    "Two\x07.</think>4": "unreadable: broken characters",
}


def test_each_answer_is_refused_for_its_own_reason(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "2+2?<think>", "answer": "4"})
    folder = run(
        ScriptedEngine(says(checkpoint, *ANSWERS)),
        "filters.3={name: readable, longest_paragraph: 60}",
        sampling={"k": len(ANSWERS), "max_tokens": 240},
        filters=[{"name": n} for n in ("finished", "correct", "language", "readable", "distinct")],
    )
    written = lines(folder / "answers.jsonl")
    assert {row["text"]: row["verdict"] for row in written if row["finish"] == "stop"} == {
        text: verdict for text, verdict in ANSWERS.items() if verdict != "truncated"
    }
    assert [row["sample"] for row in written] == list(range(len(ANSWERS)))
    summary = json.loads((folder / "summary.json").read_text())
    refused = [verdict for verdict in ANSWERS.values() if verdict != KEPT]
    assert summary["refused"] == {reason: refused.count(reason) for reason in set(refused)}
    assert summary["kept"] == 4 and summary["answers"] == len(ANSWERS)
    assert summary["prompts"] == summary["prompts_solved"] == summary["prompts_kept"] == 1
    kept = [row["text"] for row in written if row["verdict"] == KEPT]
    assert [row["completion"] for row in lines(folder / "sft.jsonl")] == kept


def test_the_same_answer_to_another_prompt_is_no_duplicate_and_to_the_same_prompt_is(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    prompts = ({"prompt": text, "answer": "4"} for text in ("2+2=", "1+3=", "2+2="))
    write_prompts(tmp_path, *prompts)
    engine = ScriptedEngine(says(checkpoint, "4"))
    rows = lines(run(engine, "sampling.k=1") / "sft.jsonl")
    assert [row["provenance"]["prompt"] for row in rows] == [0, 1]


def test_the_language_of_a_line_or_of_the_filter_is_the_one_that_counts(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(
        tmp_path,
        {"prompt": "2+2=", "answer": "x"},
        {"prompt": "1+3=", "answer": "x", "language": "ru"},
    )
    engine = ScriptedEngine(says(checkpoint, "it is four", "это четыре", "3 + 1 = 4"))
    folder = run(engine, filters=[{"name": "language", "language": "en"}])
    verdicts = [row["verdict"] for row in lines(folder / "answers.jsonl")]
    mixed = "mixed language"
    assert verdicts == [KEPT, mixed, KEPT, mixed, KEPT, KEPT]


def test_at_most_so_many_of_a_prompt_are_kept_and_which_ones_is_a_matter_of_the_seed(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, *({"prompt": f"{n}?", "answer": "x"} for n in range(20)))
    texts = [f"answer {letter}" for letter in "abcdef"]
    changes = {"filters": [], "keep_per_prompt": 2, "sampling": {"k": 6, "max_tokens": 24}}
    chosen = []
    for seed in (0, 0, 1):
        engine = ScriptedEngine(says(checkpoint, *texts))
        folder = run(engine, f"output={tmp_path / str(len(chosen))}", f"seed={seed}", **changes)
        rows = [row["provenance"] for row in lines(folder / "sft.jsonl")]
        assert [row["prompt"] for row in rows] == sorted(2 * list(range(20)))
        chosen.append([row["sample"] for row in rows])
        refused = json.loads((folder / "summary.json").read_text())["refused"]
        assert refused == {"over keep_per_prompt": 80}
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0]) == set(range(6))
