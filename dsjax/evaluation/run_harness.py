"""`dsjax eval --tasks harness:NAME`: tasks of lm-evaluation-harness, by its own rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.errors import UserError
from dsjax.evaluation.harness_chat import ChatPrompts
from dsjax.evaluation.settings import HarnessSettings, Room
from dsjax.inference.reader import read_checkpoint
from dsjax.places import local_path
from dsjax.small_files import write_whole

KEPT = (
    "results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs", "thinks"
)  # fmt: skip
"""Of what the harness returns: its numbers, and what they are numbers of."""


def run_harness(
    checkpoint: Path,
    names: Sequence[str],
    room: Room,
    settings: HarnessSettings,
    *,
    limit: int | None,
    output: Path,
    include: Path | None,
) -> None:
    """Evaluate a checkpoint on tasks of lm-evaluation-harness; writes harness.json.

    Args:
        names: of tasks, groups or tags, as `lm_eval ls tasks` lists them.
        room: how the model is held.
        settings: prompt format, sampling and thinking.
        limit: only so many questions of each task.
        output: the folder of harness.json.
        include: a folder with more tasks, as YAML.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, the checkpoint cannot be used, or a
            task cannot be scored since the model thinks.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected at least 1")
    output = local_path(output, "--output")
    manager = _find(names, include)
    chat = ChatPrompts(read_checkpoint(checkpoint).template, settings.think)
    thinks = settings.chat and chat.thinks
    tasks = _load(manager, names, chat if thinks else None)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import make_table

    found: Any = simple_evaluate(
        _open(checkpoint, room, settings),
        tasks=tasks,
        num_fewshot=settings.few_shot,
        limit=limit,
        apply_chat_template=settings.chat,
        gen_kwargs=_gen_kwargs(settings, thinks),
        task_manager=manager,
        log_samples=False,
    )
    _write(output, {**found, "thinks": thinks})
    print(make_table(found))
    print(output / "harness.json")


def _gen_kwargs(settings: HarnessSettings, thinks: bool) -> dict[str, Any] | None:
    """What is changed in the tasks' own settings; what a thought changes is printed."""
    found = settings.gen_kwargs(thinks)
    if thinks:
        print(
            f"answers begin with a thought: at most {found['max_gen_toks']:,} tokens with it, at "
            f"temperature {found['temperature']:g} and top-p {found['top_p']:g}; what follows "
            "</think> is scored"
        )
    return found or None


def _open(checkpoint: Path, room: Room, settings: HarnessSettings) -> Any:
    from dsjax.evaluation.harness import HarnessModel

    make: Any = HarnessModel  # lm-eval's base class hides the constructor from type checkers
    return make(
        str(checkpoint),
        dtype=room.dtype,
        rows=room.rows,
        mesh=room.mesh,
        max_length=None if room.context is None else room.context - 2,
        enable_thinking=settings.think,
    )


def _load(manager: Any, names: Sequence[str], chat: ChatPrompts | None) -> list[Any]:
    """Load groups and tasks by name, and check them before any weights are read."""
    found: list[Any] = []
    for name in names:
        loaded = manager.load([name])
        if chat is not None:
            chat.check(loaded["tasks"].values())
        group = loaded["groups"].get(name)
        found += loaded["tasks"].values() if group is None else [group]
    return found


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
