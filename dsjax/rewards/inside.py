"""What is done inside a jail with what a model wrote: run a program, compare mathematics."""

from __future__ import annotations

import atexit
import io
import os
import sys
import threading
import types
from typing import Any

UNREADABLE = b"?"
"""Said of a gold answer in which math-verify finds no mathematics."""


def run_program(code: str, stdin: str, output: int) -> None:
    """Run Python source as a program, with `stdin` to read and `output` to write to.

    It knows nothing of what is expected of it: that is compared elsewhere.
    """
    with open("stdin", "w", encoding="utf-8", errors="replace", newline="") as file:
        file.write(stdin)
    os.dup2(os.open("stdin", os.O_RDONLY), 0)
    os.unlink("stdin")
    os.dup2(output, 1)
    os.close(output)
    sys.stdin = io.TextIOWrapper(io.FileIO(0), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding="utf-8", errors="replace")
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    try:
        load_program(code, "__main__")
    finally:
        # What the interpreter does when a program ends.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()


def load_program(code: str, name: str) -> dict[str, Any]:
    """Execute source as the module `name`; returns its names."""
    os.environ.clear()
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["answer.py"]
    exec(compile(code, "answer.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def compare_mathematics(expected: str, found: str, output: int) -> None:
    """Write 1 where two formulas are equal, else 0; UNREADABLE where `expected` is none."""
    from dsjax.rewards.equality import UnreadableError, verify

    try:
        os.write(output, b"1" if verify(expected, found) else b"0")
    except UnreadableError:
        os.write(output, UNREADABLE)
