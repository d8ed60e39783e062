"""One run of untrusted work: made by fork from a keeper, watched by a guardian, gone afterwards.

    keeper ── fork ──> guardian ── fork ──> the work
                       leaves all namespaces  first process of its own family of processes
                       reads, times, kills    limits, no rights, a filter on system calls

The guardian is what the work cannot see: it is of another family of processes. Killing the work's
first process kills all that it started. A guardian that loses its keeper kills and ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dsjax.rewards import namespaces, seccomp
from dsjax.rewards.namespaces import Limits, View

OK, TIME, MEMORY, OUTPUT, CRASH = "ok", "time", "memory", "output", "crash"
UNISOLATED = "unisolated"
"""The machine refused a namespace, a mount or the filter: `output` says which."""

_OUT_OF_MEMORY = 121
"""The exit code of work that met a MemoryError."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it wrote until then."""

    ended: str
    output: bytes = b""

    def packed(self) -> bytes:
        """As JSON, without which bytes could not be told from their end."""
        return json.dumps([self.ended, self.output.decode("latin-1")]).encode()


class Jail:
    """A run that has begun; `wait` for its outcome."""

    def __init__(
        self,
        work: Callable[[int], None],
        limits: Limits,
        view: View,
        keep: Sequence[int] = (),
    ):
        """Start `work`, which writes to the descriptor it is given.

        Of the keeper's other descriptors it has those in `keep` only. The keeper must have a single
        thread.
        """
        # What the keeper has imported is there before the work begins, and none of its memory.
        memory_bytes = limits.memory_bytes + _address_space()
        limits = dataclasses.replace(limits, memory_bytes=memory_bytes)
        self._result, result = os.pipe()
        self._control, control = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _guard(work, limits, view, (result, control, *keep))
        os.close(result)
        control.close()
        if self._control.recv(1):  # it left its namespaces, and waits to be somebody
            namespaces.map_user(self._pid)
            self._control.send(b"m")

    def fileno(self) -> int:
        """Can be read from once there is an outcome."""
        return self._result

    def wait(self) -> Outcome:
        """Wait until it ended."""
        with os.fdopen(self._result, "rb") as result:
            packed = result.read()
        self._control.close()
        os.waitpid(self._pid, 0)
        if not packed:
            return Outcome(CRASH)
        ended, output = json.loads(packed)
        return Outcome(ended, output.encode("latin-1"))


def _address_space() -> int:
    """Bytes that this process, and so its next child, has mapped already."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _guard(
    work: Callable[[int], None], limits: Limits, view: View, keep: tuple[Any, ...]
) -> NoReturn:
    """The guardian's life: build the jail, start the work in it, watch it, tell the outcome."""
    result, control, *kept = keep
    try:
        try:
            outcome = _imprison(work, limits, view, control, [result, *kept])
        except OSError as error:
            outcome = Outcome(UNISOLATED, namespaces.why_not(error).encode())
        with os.fdopen(result, "wb") as file:
            file.write(outcome.packed())
    finally:
        os._exit(0)  # whatever happened: above are the frames of the keeper's own life


def _imprison(
    work: Callable[[int], None],
    limits: Limits,
    view: View,
    control: socket.socket,
    keep: list[int],
) -> Outcome:
    result, *kept = keep
    _close_all_but(result, control.fileno(), *kept)
    namespaces.unshare(view.network)
    taken = namespaces.take(view)
    control.send(b"u")
    control.recv(1)
    namespaces.become_nobody()
    namespaces.build_root(view, taken)
    output, write = os.pipe()
    failed, fail = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work(work, limits, view.network, (write, fail, *kept))
    for descriptor in (write, fail, *kept):
        os.close(descriptor)
    with os.fdopen(failed, "rb") as told:
        if why := told.read():  # the filter was refused; else the pipe closes once it is there
            os.waitpid(pid, 0)
            return Outcome(UNISOLATED, why)
    return _watch(pid, output, control, limits)


def _work(
    work: Callable[[int], None], limits: Limits, network: bool, keep: tuple[int, ...]
) -> NoReturn:
    """Become harmless, then work."""
    write, fail, *kept = keep
    code = 1
    try:
        try:
            namespaces.die_with_parent()
            _close_all_but(write, fail, *kept)
            limits.apply()
            namespaces.drop_rights()
            seccomp.restrict(network)
        except OSError as error:
            os.write(fail, namespaces.why_not(error).encode())
            raise
        os.close(fail)
        work(write)
        code = 0
    except SystemExit as left:
        code = 0 if left.code in (None, 0) else 1
    except MemoryError:
        code = _OUT_OF_MEMORY
    finally:
        os._exit(code)  # what the work raised is its own affair: it is a crash


def _watch(pid: int, output: int, control: socket.socket, limits: Limits) -> Outcome:
    """Read what the work writes until it ends, or until it is over a limit."""
    written = bytearray()
    killed = ""
    deadline = time.monotonic() + limits.wall_seconds
    ended = namespaces.open_process(pid)
    waiting = [output, ended, control.fileno()]
    while not killed:
        ready, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
        if time.monotonic() >= deadline:  # looked at first: output may come for ever, in drops
            killed = TIME
        elif control.fileno() in ready:
            killed = CRASH  # nobody waits for it any more
        elif output in ready:
            data = os.read(output, 1 << 16)
            written += data
            if not data:
                waiting.remove(output)
            if len(written) > limits.output_bytes:
                killed = OUTPUT
        else:
            break
    os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return Outcome(
        killed or _verdict(status, used.ru_utime + used.ru_stime, limits), bytes(written)
    )


def _verdict(status: int, seconds: float, limits: Limits) -> str:
    """How work ended that was not killed by the guardian."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return OK
    if code == -signal.SIGKILL and seconds > limits.seconds - 0.5:
        return TIME
    return MEMORY if code == _OUT_OF_MEMORY else CRASH


def _close_all_but(*kept: int) -> None:
    """Close every descriptor but these and the three standard ones, which lead nowhere."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    begin = 3
    for descriptor in sorted(kept):
        os.closerange(begin, descriptor)
        begin = descriptor + 1
    os.closerange(begin, os.sysconf("SC_OPEN_MAX"))
