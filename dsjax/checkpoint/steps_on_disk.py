"""The steps of a run on a disk: a folder that got its name by one `rename` is a complete step.

folder/00000120/state/          every array, as orbax writes it (OCDBT)
folder/00000120/extra.json      what is not an array: iterator, fingerprints, tokens seen
folder/00000120/manifest.json   digest of every file, shape and dtype of every array
folder/00000121.tmp-1f9a03c2/   a save that is under way, or was killed: never a checkpoint
folder/00000060.old/            a step that is being deleted: no longer a checkpoint
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

from dsjax.checkpoint.manifest import Leaves, flush_directory, verify, write_manifest
from dsjax.errors import UserError


class StepsOnDisk:
    """The steps below `folder`. Of several processes one calls what writes; any may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder, see that it can be written, and clear it of what a killed run left.

        For the run that owns the folder alone: another one's save under way looks the same.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            self._remove_leftovers()
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot hold checkpoints ({error.strerror}); "
                "choose a directory that can be written"
            ) from error

    def path(self, step: int) -> Path:
        """Where a complete step is."""
        return self._folder / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have their final name, whatever is in them, oldest first."""
        names = [path.name for path in self._folder.iterdir()]
        return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))

    def begin(self, step: int) -> Path:
        """Where a save of this step writes its `state`.

        A name of its own, so that nothing a failed save still writes gets into the next one.
        """
        return self._folder / f"{step:08d}.tmp-{secrets.token_hex(4)}"

    def commit(self, step: int, folder: Path, leaves: Leaves, extra: str) -> None:
        """Make a step of what `begin` gave, once every process has written its state."""
        (folder / "extra.json").write_text(extra, encoding="utf-8")
        write_manifest(folder, step, leaves)
        if self.path(step).exists():
            self._retire(step)
        os.rename(folder, self.path(step))
        flush_directory(self._folder)

    def discard(self, folder: Path) -> None:
        """Delete what a failed save has written."""
        shutil.rmtree(folder, ignore_errors=True)

    def remove_beyond(self, newest: int, keep: int) -> None:
        """Delete all steps but `newest` and the `keep - 1` before it."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-keep:]
        for step in steps:
            if step not in kept:
                self._retire(step)
        self._remove_leftovers()

    def verify(self, step: int, part: tuple[int, int]) -> Leaves:
        """The leaves of a step, once a part of its files is known to be what was saved.

        Raises:
            DamagedError: one is not, or a file is missing or surplus.
        """
        return verify(self.path(step), step, part)

    def _retire(self, step: int) -> None:
        """Take the name of a step away at once, so that a half deleted step never looks whole."""
        os.rename(self.path(step), self.path(step).with_suffix(".old"))

    def _remove_leftovers(self) -> None:
        for path in self._folder.iterdir():
            if re.fullmatch(r"\d{8,}\.(tmp-[0-9a-f]{8}|old)", path.name):
                shutil.rmtree(path)
