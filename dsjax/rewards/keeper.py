"""The keeper: `python -m dsjax.rewards.keeper FD KIND`, a process that forks a jail for every job.

It is started afresh, since a process that has jax in it has threads, and must not fork. It imports
what its kind of work needs once, and a fork has it at once: sympy alone takes two seconds. It meets
no text of a model itself, but hands it on.

What a keeper has read its jails can find in their memory. So those of code are never told what is
expected: outputs are compared elsewhere, and tests have keepers of their own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsjax.errors import UserError
from dsjax.rewards import inside, jail, namespaces, own_code, remote
from dsjax.rewards.answer import Answer
from dsjax.rewards.jail import Jail, Outcome
from dsjax.rewards.namespaces import Limits, View

Job = dict[str, Any]
"""`limits`, what the kind of work takes, and `channel` where a descriptor comes along."""

Work = Callable[[int], None]
"""Done inside a jail; it writes to the descriptor that it is given."""

MATH, CODE, TESTS, PYTHON = "math", "code", "tests", "python"

_LENGTH = struct.Struct("=Q")


def send(line: socket.socket, data: bytes, channel: socket.socket | None = None) -> None:
    """Send a message, and after it a descriptor."""
    line.sendall(_LENGTH.pack(len(data)) + data)
    if channel is not None:
        socket.send_fds(line, [b"c"], [channel.fileno()])


def receive(line: socket.socket) -> bytes:
    """The next message.

    Raises:
        EOFError: there is none, or not all of one.
    """
    (length,) = _LENGTH.unpack(_exactly(line, _LENGTH.size))
    return _exactly(line, length)


def _exactly(line: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = line.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main(descriptor: str, kind: str, *arguments: str) -> None:
    """Get ready, try a jail, say how that went, and do jobs until there are no more."""
    line = socket.socket(fileno=int(descriptor))
    if sys.platform != "linux":
        return send(line, Outcome(jail.UNISOLATED, f"it is {sys.platform}".encode()).packed())
    try:
        work_of, view = _KINDS[kind](*arguments)
    except UserError as error:
        return send(line, Outcome(jail.CRASH, str(error).encode()).packed())
    except Exception as error:
        said = Outcome(jail.CRASH, f"{type(error).__name__}: {error}".encode())
        return send(line, said.packed())
    gc.freeze()  # what is there stays: a child need not copy it to count it
    send(line, Jail(lambda _: None, Limits(10, 1 << 28), view).wait().packed())
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = json.loads(receive(line))
            kept: list[int] = []
            if job.get("channel"):
                kept = socket.recv_fds(line, 1, 1)[1]
            begun = Jail(work_of(job, *kept), Limits(**job["limits"]), view, kept)
            for channel in kept:
                os.close(channel)
            ready, _, _ = select.select([begun, line], [], [])
            if begun not in ready:
                return  # nobody waits any more; the jail's guardian sees that we are gone
            send(line, begun.wait().packed())


def _code() -> tuple[Callable[..., Work], View]:
    def work_of(job: Job, channel: int | None = None) -> Work:
        if channel is None:
            return partial(inside.run_program, job["code"], job["stdin"])
        return lambda _: remote.serve(job["code"], socket.socket(fileno=channel))

    return work_of, namespaces.standard_library()


def _tests() -> tuple[Callable[..., Work], View]:
    def work_of(job: Job, channel: int) -> Work:
        return lambda output: remote.check(
            job["tests"], job["entry_point"], socket.socket(fileno=channel), output
        )

    return work_of, namespaces.standard_library()


_WARMING = (
    (r"\frac{1}{2}x", r"\frac{2}{4} x"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(-\infty,0)\cup(1,2]", r"(1,2]\cup(-\infty,0)"),
    (r"\frac{\sqrt{3}}{2}", r"\sin(\pi/3)"),
    (r"\sin(2x)", r"2\sin x\cos x"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\log_2 8", "3"),
    ("x=1,y=2", "(1,2)"),
    ("3+4i", "x < 3"),
)
"""Of most kinds one: sympy imports and remembers much at the first, and every fork has it then.
Without these, comparing two polynomials takes ten times as long."""


def _mathematics() -> tuple[Callable[..., Work], View]:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("it needs the math-verify package: pip install 'dsjax[post]'")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.redirect_stderr(None):
        for expected, found in _WARMING:
            inside.compare_mathematics(expected, found, nowhere)
    os.close(nowhere)

    def work_of(job: Job) -> Work:
        return partial(inside.compare_mathematics, job["expected"], job["found"])

    return work_of, namespaces.installed_packages()


def _user_function(path: str, name: str, network: str) -> tuple[Callable[..., Work], View]:
    file = Path(path).resolve()
    function = own_code.import_function(file, name)

    def work_of(job: Job) -> Work:
        answers = [Answer(**answer) for answer in job["answers"]]
        return partial(own_code.call_function, function, answers, file)

    return work_of, namespaces.installed_packages(str(file.parent), network=network == "network")


_KINDS: dict[str, Callable[..., tuple[Callable[..., Work], View]]] = {
    MATH: _mathematics,
    CODE: _code,
    TESTS: _tests,
    PYTHON: _user_function,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
