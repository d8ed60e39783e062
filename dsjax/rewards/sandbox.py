"""Keepers, several at work side by side, and jobs for them.

Whatever happens in a jail comes back as an outcome. Only a machine on which there can be no jail
is an error, and it is one before the first answer is looked at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from dsjax.errors import UserError
from dsjax.rewards import jail, keeper
from dsjax.rewards.jail import Outcome
from dsjax.rewards.keeper import CODE, MATH, PYTHON, TESTS
from dsjax.rewards.namespaces import Limits

T = TypeVar("T")
R = TypeVar("R")

_HOUSE = str(Path(__file__).resolve().parents[2])
_START_SECONDS = 300.0
"""For the imports of a user's file; ours take three."""
_PATIENCE = 2.0
"""For code to end once its tests are done."""
_MACHINERY_SECONDS = 30.0
"""Beyond a job's own limits, for a keeper to answer."""

LIMITS_HELP = (
    "it needs Linux 5.12 or newer that lets it make namespaces; in Docker add "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined (docs/gpu.md has "
    "Kubernetes, Slurm and Ubuntu), or leave this reward out"
)


class Keeper:
    """One helper process, started when it is needed, and again when it was lost."""

    def __init__(self, kind: str, *arguments: str):
        self._command = [kind, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "dsjax.rewards.keeper", str(theirs.fileno())]
        # A user's file may need its user's environment; code of a model gets to see none.
        kept = dict(os.environ) if self._command[0] == PYTHON else {}
        self._process = subprocess.Popen(
            [*command, *self._command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us, who may want to finish a step
            pass_fds=[theirs.fileno()],
            env=kept
            | {
                "PYTHONPATH": os.pathsep.join([_HOUSE, *filter(None, [kept.get("PYTHONPATH")])]),
                "PYTHONHASHSEED": "0",  # the same order of a set, run after run
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        )
        theirs.close()
        self._line = ours
        self._greeted = False

    def greet(self) -> Outcome:
        """Wait until it is ready: how its first jail went, or what its imports raised."""
        outcome = self._receive(_START_SECONDS)
        self._greeted = outcome.ended == jail.OK
        return outcome

    def send(
        self, job: dict[str, Any], limits: Limits, channel: socket.socket | None = None
    ) -> None:
        """Give it a job."""
        if self._line is None:
            self._start()
        if not self._greeted:
            self.greet()
        described = {**job, "limits": dataclasses.asdict(limits), "channel": channel is not None}
        try:
            if self._line is not None:
                keeper.send(self._line, json.dumps(described).encode(), channel)
        except OSError:
            self.close()

    def outcome(self, seconds: float) -> Outcome:
        """What became of the job; a keeper that takes longer is killed, and so is its jail."""
        return self._receive(seconds)

    def do(self, job: dict[str, Any], limits: Limits) -> Outcome:
        """A job, from beginning to end."""
        self.send(job, limits)
        return self.outcome(limits.wall_seconds + _MACHINERY_SECONDS)

    def _receive(self, seconds: float) -> Outcome:
        if self._line is None:
            return Outcome(jail.CRASH)
        self._line.settimeout(seconds)
        try:
            ended, output = json.loads(keeper.receive(self._line))
        except (OSError, EOFError) as error:
            self.close()
            return Outcome(jail.TIME if isinstance(error, TimeoutError) else jail.CRASH)
        self._line.settimeout(None)
        return Outcome(ended, output.encode("latin-1"))

    def close(self) -> None:
        """Kill it. Its jail's guardian sees that, kills, and ends."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Sandbox:
    """`workers` jobs at a time, each in a jail of its own; a context manager."""

    def __init__(self, kinds: Sequence[str], workers: int):
        """Start keepers of each of the `kinds` for every worker.

        Raises:
            UserError: this machine gives no isolation, or a package is not installed.
        """
        self._free: queue.SimpleQueue[dict[str, Keeper]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, "rewards")
        self._keepers = [{kind: Keeper(kind) for kind in kinds} for _ in range(workers)]
        try:
            for keepers in self._keepers:
                for kind, one in keepers.items():
                    require_ready(one, f"the reward {'math' if kind == MATH else 'code'!r}")
                self._free.put(keepers)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, do: Callable[[dict[str, Keeper], T], R], items: Sequence[T]) -> list[R]:
        """`do` with a worker's keepers and each item, side by side; results in the items' order."""

        def one(item: T) -> R:
            keepers = self._free.get()
            try:
                return do(keepers, item)
            finally:
                self._free.put(keepers)

        return list(self._threads.map(one, items))

    def close(self) -> None:
        """Kill everything."""
        for keepers in self._keepers:
            for one in keepers.values():
                one.close()
        self._threads.shutdown(cancel_futures=True)


def require_ready(one: Keeper, what: str) -> None:
    """Wait for a keeper.

    Raises:
        UserError: it cannot do its work, and why.
    """
    outcome = one.greet()
    said = outcome.output.decode(errors="replace")
    if outcome.ended == jail.UNISOLATED:
        raise UserError(f"{what}: this machine refuses isolation ({said}); {LIMITS_HELP}")
    if outcome.ended != jail.OK:
        lost = "its process ended at its start"
        if outcome.ended == jail.TIME:
            lost = f"its imports did not end within {_START_SECONDS:g} s"
        raise UserError(f"{what}: {said or lost}")


def run_tests(
    keepers: dict[str, Keeper], code: str, tests: str, entry_point: str | None, limits: Limits
) -> Outcome:
    """Tests in one jail, the code that they test in another, a line between them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        keepers[CODE].send({"code": code}, limits, theirs)
        keepers[TESTS].send({"tests": tests, "entry_point": entry_point}, limits, ours)
    tested = keepers[TESTS].outcome(limits.wall_seconds + _MACHINERY_SECONDS)
    served = keepers[CODE].outcome(_PATIENCE)
    if tested.ended == jail.OK and json.loads(tested.output).get("gone"):
        return Outcome(jail.CRASH if served.ended == jail.OK else served.ended)
    return tested
