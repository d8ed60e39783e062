"""What a run records: one JSON line a step, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tensorboardX import SummaryWriter

from dsjax.small_files import write_whole
from sharding.distributed import is_first, share

Record = dict[str, Any]


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/` of a run directory.

    A resumed run drops what was recorded after the step it resumes from, so that every step
    stands in the file once. Of several processes the first one writes; the others' logs do nothing.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self.is_evaluated = share("metrics", lambda: self._keep_until(resume_step))
        """Whether all held-out rows were scored at the step that the run resumes from."""
        self._file: IO[str] | None = None
        if not is_first():
            return
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Record a step's values; numbers that are not finite become null."""
        if self._file is None:
            return
        record = {"step": step, **{name: plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def cut(self) -> None:
        """Nothing: a file is appended to at once, and holds no record back until a save."""

    def close(self) -> None:
        """Flush and close both."""
        if self._file is None:
            return
        self._file.close()
        self._board.close()

    def _keep_until(self, step: int) -> bool:
        """Drop the records after `step`; returns whether that step was evaluated."""
        if not self._path.exists():
            return False
        kept = [record for record in read_metrics(self._path) if record["step"] <= step]
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return any(record["step"] == step and record.get("held_out_complete") for record in kept)


def read_metrics(path: Path) -> list[Record]:
    """All complete records; a line that a killed run left half written ends the list."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plain(value: Any) -> Any:
    """A value as JSON has it; numbers that are not finite become null."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
