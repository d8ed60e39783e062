"""What becomes of scored answers: verdicts, the three files, and a few lines for who waits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax.config_sample import SampleConfig
from dsjax.journal import as_line
from dsjax.posttraining.sample_filters import KEPT, Judge
from dsjax.posttraining.sample_rows import Drawn, data_row
from dsjax.small_files import write_whole
from dsjax.training.progress import say

ANSWERS, DATA, SUMMARY = "answers.jsonl", "sft.jsonl", "summary.json"


def write_results(
    output: Path,
    config: SampleConfig,
    groups: Sequence[Sequence[Drawn]],
    settings: Mapping[str, Any],
    origin: Mapping[str, Any],
    speed: float | None,
    console: Console,
) -> None:
    """Judge all answers and write the files, each whole, `SUMMARY` last; say what was kept.

    Args:
        groups: the answers to each prompt.
        settings: what the files depend on, for who comes again.
        origin: what the provenance of every row says alike.
        speed: tokens a second, if any were drawn.
    """
    judge = Judge(config)
    verdicts = [judge.judge(group) for group in groups]
    judged = [
        pair
        for group, said in zip(groups, verdicts, strict=True)
        for pair in zip(group, said, strict=True)
    ]
    rows = (data_row(drawn, origin) for drawn, verdict in judged if verdict == KEPT)
    write_whole(output / ANSWERS, (as_line(_answer_row(*pair)) for pair in judged))
    write_whole(output / DATA, map(as_line, rows))
    counts = _count(judged)
    summary = {"settings": settings, **counts, "tokens_per_second": speed and round(speed, 1)}
    write_whole(output / SUMMARY, json.dumps(summary, indent=1).encode() + b"\n")
    for reason, count in counts["refused"].items():
        say(console, f"{count:8,} refused: {reason}")
    say(
        console,
        f"{counts['kept']:8,} kept of {counts['answers']:,} answers, for "
        f"{counts['prompts_kept']:,} of {counts['prompts']:,} prompts: {output / DATA}",
    )


def _answer_row(drawn: Drawn, verdict: str) -> dict[str, Any]:
    score = drawn.score
    return {
        "prompt": drawn.asked.number,
        "sample": drawn.sample,
        "seed": drawn.seed,
        **drawn.record,
        "reward": score["total"],
        "rewards": score["values"],
        "failures": score["reasons"],
        "verdict": verdict,
    }


def _count(judged: Sequence[tuple[Drawn, str]]) -> dict[str, Any]:
    """What became of the answers, and of the prompts."""
    drawn = [one for one, _ in judged]
    verdicts = Counter(verdict for _, verdict in judged)
    kept = verdicts.pop(KEPT, 0)
    failures = Counter(
        f"{name}: {reason}" for one in drawn for name, reason in one.score["reasons"].items()
    )
    return {
        "prompts": len({one.asked.number for one in drawn}),
        "prompts_solved": len({one.asked.number for one in drawn if one.is_right}),
        "prompts_kept": len({one.asked.number for one, verdict in judged if verdict == KEPT}),
        "answers": len(drawn),
        "pass@1": sum(one.is_right for one in drawn) / len(drawn),
        "kept": kept,
        "refused": dict(sorted(verdicts.items())),
        "verifier_failures": dict(sorted(failures.items())),
        "answer_tokens": sum(one.record["tokens"] for one in drawn) / len(drawn),
    }
