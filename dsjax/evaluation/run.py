"""`dsjax eval`: draw the samples that are missing, grade them, write and show the results."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax.errors import UserError
from dsjax.evaluation.grading import check_verifiers, grade
from dsjax.evaluation.protocol import Key, Sample, draw, plan
from dsjax.evaluation.results import draw_results, print_table, write_results
from dsjax.evaluation.settings import Room, Settings
from dsjax.evaluation.statistics import Grade, score_task
from dsjax.evaluation.task import Task
from dsjax.evaluation.tasks import open_tasks
from dsjax.inference.reader import Reader, read_checkpoint, weights_stamp
from dsjax.journal import Journal
from dsjax.places import local_path
from dsjax.training.progress import ThroughputDisplay, say
from dsjax.training.signals import catch_termination


def run_eval(
    checkpoint: Path,
    names: Sequence[str],
    settings: Settings,
    room: Room,
    *,
    limit: int | None,
    output: Path,
) -> None:
    """Evaluate a checkpoint on tasks; called again, it draws only what is not there yet.

    Writes answers.jsonl while it runs, then results.json and results.png.

    Raises:
        UserError: the checkpoint, a task or the output cannot be used, before any weight is read.
        SystemExit: 143 or 130, after SIGTERM or SIGINT; the samples that were drawn are kept.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 120  # of a table in a file
    reader = read_checkpoint(checkpoint)
    tasks = open_tasks(names, limit)
    context = _context(reader, room)
    samples = plan(tasks, reader, settings, context)
    check_verifiers(tasks)
    output = local_path(output, "--output")
    output.mkdir(parents=True, exist_ok=True)
    drawn_with = {
        "checkpoint": str(checkpoint),
        "weights": weights_stamp(checkpoint),
        **dataclasses.asdict(settings),
        "context": context,
        "dtype": room.dtype,
    }
    del drawn_with["k"]  # more samples can be drawn later
    with Journal(output / "answers.jsonl", drawn_with, Key) as journal:
        _complete(reader, settings, room, samples, journal, console)
        graded = []
        for task in tasks:
            drawn = [sample for sample in samples if sample.key.task == task.name]
            verdicts = output / f"verdicts-{task.name}.jsonl"
            graded.append((task, *grade(task, reader, drawn, journal, verdicts)))
    shortened = sum(sample.max_tokens < settings.max_tokens for sample in samples)
    about = {"settings": {**drawn_with, "k": settings.k, "limit": limit}, "shortened": shortened}
    _report(output, about, graded, console)


def _report(
    output: Path,
    about: dict[str, Any],
    graded: Sequence[tuple[Task, list[list[Grade]], Counter[str]]],
    console: Console,
) -> None:
    """Write and show what the grades come to."""
    grades = {task.name: found for task, found, _ in graded}
    scores = {
        task.name: score_task(found, votes=task.votes, failures=failures)
        for task, found, failures in graded
    }
    versions = {name: version(name) for name in ("dsjax", "jax", "flax")}
    write_results(output / "results.json", {**about, "versions": versions}, scores)
    drawn_with = about["settings"]
    title = (
        f"{Path(drawn_with['checkpoint']).name}: {drawn_with['k']} samples a question at "
        f"temperature {drawn_with['temperature']}, top-p {drawn_with['top_p']}"
    )
    draw_results(output / "results.png", title, scores, grades)
    print_table(console, scores)
    for task, _, failures in graded:
        for reason, count in sorted(failures.items()):
            say(console, f"{task.name}: {count:,} answers without a verdict: {reason}")
    if about["shortened"]:
        say(
            console,
            f"{about['shortened']:,} samples had less than {drawn_with['max_tokens']:,} tokens: "
            f"the context is {drawn_with['context']:,}",
        )
    say(console, f"{output / 'results.json'}, and results.png beside it")


def _context(reader: Reader, room: Room) -> int:
    longest = reader.config.max_position_embeddings
    if room.context is None:
        return longest
    if not 2 <= room.context <= longest:
        raise UserError(
            f"--context is {room.context}; the model was made for at most {longest}, expected 2 to "
            "that"
        )
    return room.context


def _missing(samples: Sequence[Sample], journal: Journal[Key]) -> list[Sample]:
    """Samples without a record; a record of another question under the same id is refused."""
    missing = []
    for sample in samples:
        record = journal.records.get(sample.key)
        if record is None:
            missing.append(sample)
        elif record.get("digest") != sample.digest:
            raise UserError(
                f"{sample.key.task}: question {sample.key.question!r} is another one than when it "
                "was answered; choose another --output"
            )
    return missing


def _complete(
    reader: Reader,
    settings: Settings,
    room: Room,
    samples: Sequence[Sample],
    journal: Journal[Key],
    console: Console,
) -> None:
    """Draw what is missing; leave, if a signal asks to stop before all is there."""
    missing = _missing(samples, journal)
    before = len(samples) - len(missing)
    if before:
        say(console, f"{before:,} of {len(samples):,} samples are there already")
    if not missing:
        return
    # Imported late: what is wrong with an evaluation, or done already, is said without jax.
    from dsjax.inference.opening import open_engine

    # Of all samples, not of those that are missing: so a resumed evaluation runs the same programs.
    context = max(len(sample.prompt) + sample.max_tokens for sample in samples)
    engine = open_engine(reader, room.rows, context, dtype=room.dtype, mesh=room.mesh)
    progress = ThroughputDisplay("samples", len(samples), before, console)
    with catch_termination() as asked, progress:
        for tokens in draw(engine, reader, settings, missing, journal.write):
            progress.update(before + journal.written, tokens)
            if asked.received is not None:
                break
    say(console, f"drawn at {progress.tokens_per_second:,.0f} tokens/s")
    if asked.received is not None and before + journal.written < len(samples):
        say(console, "stopped; what was drawn is kept, and the same command goes on")
        sys.exit(128 + asked.received)
