"""Compare a resumed run's settings with those it was last started with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore
from dsjax.config import RunConfig
from dsjax.config_files import read_yaml
from dsjax.errors import UserError
from dsjax.training.progress import say

_SHOWN = 80
"""Characters of a value."""

_OF_CHECKPOINTS = ("task", "model", "lora")
"""Sections that decide which arrays a checkpoint holds, and what they mean."""

_OF_A_START = ("run_dir", "distributed")
"""Settings that may differ from one start of a run to the next."""


class Change(NamedTuple):
    """A setting that differs; a key that the older config.yaml lacks does not count."""

    key: str
    was: Any
    now: Any

    @property
    def section(self) -> str:
        """The first part of its key."""
        return self.key.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.key} was {_short(self.was)}, is {_short(self.now)}"


def resumed_changes(folder: Path, config: RunConfig, store: CheckpointStore) -> list[Change]:
    """Return the settings that differ from the config.yaml of a run with checkpoints.

    Raises:
        UserError: the file is damaged, or a change affects which arrays a checkpoint holds.
    """
    file = folder / "config.yaml"
    if not file.is_file() or not store.steps():
        return []
    compared = _compare("", read_yaml(file), config.model_dump(mode="json"))
    changes = [change for change in compared if change.section not in _OF_A_START]
    refuse_other_arrays(folder, changes)
    return changes


def refuse_other_arrays(folder: Path, changes: list[Change]) -> None:
    """Refuse changes of settings that decide which arrays a checkpoint holds.

    Raises:
        UserError: naming the setting.
    """
    for change in changes:
        if change.section in _OF_CHECKPOINTS:
            raise UserError(
                f"{folder}: holds a checkpoint of another model: {change}; restore the setting, or "
                "choose another run_dir"
            )


def say_resumed(console: Console, run_dir: str, step: int, changes: list[Change]) -> None:
    """Print the step that a run resumes at, and its changed settings."""
    say(console, f"resuming {run_dir} at step {step:,}")
    if changes:
        say(console, f"from here on with other settings: {describe_changes(changes)}")


def describe_changes(changes: list[Change]) -> str:
    """Join changes into one line."""
    return "; ".join(map(str, changes))


def _compare(key: str, was: Any, now: Any) -> Iterator[Change]:
    both = isinstance(was, dict) and isinstance(now, dict)
    if both and was.get("name") == now.get("name"):  # an item of another name is another item
        for name in now:
            if name in was:
                yield from _compare(f"{key}.{name}".lstrip("."), was[name], now[name])
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _compare(f"{key}.{number}", one, other)
    elif was != now:
        yield Change(key, was, now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."
