"""`dsjax eval --tasks harness:NAME`: tasks of lm-evaluation-harness, by its own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.errors import UserError
from dsjax.evaluation.settings import Room
from dsjax.places import local_path
from dsjax.small_files import write_whole

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
"""Of what the harness returns: its numbers, and what they are numbers of."""


def run_harness(
    checkpoint: Path,
    names: Sequence[str],
    room: Room,
    *,
    limit: int | None,
    output: Path,
    include: Path | None,
    few_shot: int | None,
    chat: bool,
) -> None:
    """Evaluate a checkpoint on tasks of lm-evaluation-harness; writes harness.json.

    Args:
        names: of tasks, groups or tags, as `lm_eval ls tasks` lists them.
        include: a folder with more tasks, as YAML.
        few_shot: examples before each question; None: what the task says.
        chat: whether questions are put into the checkpoint's chat template.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or the checkpoint cannot be used.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected at least 1")
    output = local_path(output, "--output")
    manager = _find(names, include)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import make_table

    from dsjax.evaluation.harness import HarnessModel

    model = HarnessModel(
        str(checkpoint),
        dtype=room.dtype,
        rows=room.rows,
        mesh=room.mesh,
        max_length=None if room.context is None else room.context - 2,
    )
    found: Any = simple_evaluate(
        model,
        tasks=list(names),
        num_fewshot=few_shot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    _write(output, found)
    print(make_table(found))
    print(output / "harness.json")


def _write(output: Path, found: Any) -> None:
    output.mkdir(parents=True, exist_ok=True)
    kept = {name: found[name] for name in KEPT if name in found}
    written = json.dumps(kept, indent=2, ensure_ascii=False, default=str)
    write_whole(output / "harness.json", written.encode() + b"\n")


def _find(names: Sequence[str], include: Path | None) -> Any:
    """The harness's own index of tasks, in which all of these are."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"tasks of lm-evaluation-harness need {error.name}: pip install 'dsjax[eval]'"
        ) from None
    if include is not None and not include.is_dir():
        raise UserError(f"--include {include}: no such folder")
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if not manager.match_tasks([name]):
            raise UserError(
                f"--tasks harness:{name}: lm-evaluation-harness knows no such task; `lm_eval ls "
                "tasks` lists them, and --include FOLDER adds those of its YAML files"
            )
    return manager
