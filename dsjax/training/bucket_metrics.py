"""What a run records where its directory is in a bucket: metrics and TensorBoard events in parts.

An object cannot be appended to. So records are held until a checkpoint is saved, and then written
as one part, named by the last step in it, and by how many parts end with that step already:

    run_dir/metrics/00000120-0.jsonl
    run_dir/tensorboard/events.out.tfevents.00000120-0

A run that is killed loses the records since its last save, which are those of the steps that it
makes again. Nothing is read or written twice, however long the run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from dsjax.places import ObjectPath, as_path, each
from dsjax.training.metrics import MetricsLog, Record, plain, read_metrics
from sharding.distributed import is_first, share


class BucketMetrics:
    """As `MetricsLog`, in parts; `cut` ends one, before a save.

    A resumed run deletes the parts after the step that it resumes from. Of several processes the
    first one writes; the others' logs do nothing.
    """

    def __init__(self, folder: ObjectPath, resume_step: int) -> None:
        self._folder = folder
        self._records: list[Record] = []
        self._names: set[str] = set()
        self.is_evaluated = share("metrics", lambda: self._keep_until(resume_step))
        """Whether all held-out rows were scored at the step that the run resumes from."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a step's values; numbers that are not finite become null."""
        self._records.append({"step": step, **{k: plain(value) for k, value in values.items()}})

    def cut(self) -> None:
        """Write what was recorded since the last part."""
        if not self._records or not is_first():
            self._records.clear()
            return
        records, self._records = self._records, []
        name = self._next_name(records[-1]["step"])
        _events(self._folder, name).write_bytes(_as_events(records))
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self._folder / f"metrics/{name}.jsonl").write_bytes(text.encode())
        self._names.add(name)

    def close(self) -> None:
        """Write the last part."""
        self.cut()

    def _keep_until(self, step: int) -> bool:
        """Delete the parts after `step`; returns whether that step was evaluated."""
        parts = _parts(self._folder)
        for name in [name for name in parts if _step_of(name) > step]:
            parts.pop(name).unlink(missing_ok=True)
            _events(self._folder, name).unlink(missing_ok=True)
        self._names = set(parts)
        last = [part for name, part in parts.items() if _step_of(name) == step]
        return any(r["step"] == step and r.get("held_out_complete") for r in _read(last))

    def _next_name(self, step: int) -> str:
        number = sum(_step_of(name) == step for name in self._names)
        return f"{step:08d}-{number}"


def open_log(folder: Path, resume_step: int) -> MetricsLog | BucketMetrics:
    """The log of a run directory, on a disk or in a bucket."""
    if isinstance(folder, ObjectPath):
        return BucketMetrics(folder, resume_step)
    return MetricsLog(folder, resume_step)


def read_records(folder: Path) -> list[Record]:
    """All records of a run directory, on a disk or in a bucket, in order."""
    if isinstance(folder, ObjectPath):
        return _read(list(_parts(folder).values()))
    return read_metrics(folder / "metrics.jsonl")


def _read(parts: list[ObjectPath]) -> list[Record]:
    texts = each(ObjectPath.read_text, parts, parts[0]) if parts else []
    return [json.loads(line) for text in texts for line in text.splitlines()]


def _parts(folder: Path) -> dict[str, ObjectPath]:
    """The parts by name, in the order in which they were written."""
    home = as_path(f"{folder}/metrics")
    assert isinstance(home, ObjectPath)
    found = {path.stem: path for path in home.glob("*-*.jsonl")}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split("-")]))


def _step_of(name: str) -> int:
    return int(name.partition("-")[0])


def _events(folder: ObjectPath, name: str) -> ObjectPath:
    return folder / f"tensorboard/events.out.tfevents.{name}"


def _as_events(records: list[Record]) -> bytes:
    """A file of TensorBoard's; what a viewer has seen of these steps was of a run that was killed.

    The library writes files, and all that it was given only when it is closed.
    """
    with tempfile.TemporaryDirectory() as folder:
        board = SummaryWriter(folder, purge_step=records[0]["step"])
        for record in records:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    board.add_scalar(name, value, record["step"])
        board.close()
        [file] = Path(folder).iterdir()
        return file.read_bytes()
