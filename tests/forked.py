"""Doors called in processes forked from one that has imported them already: a start costs a second
less, which counts where a test needs twenty of them. No thread and no backend is begun before.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

_PARENT = """
import importlib, json, os, sys
import dsjax.cli, serve, train
import dsjax.inference.engine, dsjax.training.pretrain, dsjax.serving.batch
import dsjax.posttraining.sample
from dsjax.cli import run

for line in sys.stdin:
    door, arguments, output = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = [door, *arguments]
        run({"train": train, "serve": serve, "dsjax": dsjax.cli}[door].main)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """One process after the other, each the call of a door; all it prints goes to `output`."""

    def __init__(self, parent: subprocess.Popen[str], output: Path) -> None:
        self._parent = parent
        self.output = output
        self._child: int | None = None

    def start(self, door: str, *arguments: object) -> None:
        """Call `train`, `serve` or `dsjax`."""
        assert self._parent.stdin
        line = json.dumps([door, [str(a) for a in arguments], str(self.output)])
        self._parent.stdin.write(line + "\n")
        self._parent.stdin.flush()
        self._child = self._read()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it is still at work then."""
        assert self._parent.stdout
        ready, _, _ = select.select([self._parent.stdout], [], [], seconds)
        if not ready:
            return None
        self._child = None
        return self._read()

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self._child is not None:
            os.kill(self._child, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end, unless it has ended."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            self.wait(60)

    def _read(self) -> int:
        assert self._parent.stdout
        return int(self._parent.stdout.readline())


@contextmanager
def forks(output: Path, environment: dict[str, str]) -> Iterator[Forks]:
    """Processes with this environment."""
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        bufsize=1, cwd=_ROOT, env=environment,
    ) as parent:  # fmt: skip
        try:
            yield Forks(parent, output)
        finally:
            parent.kill()
