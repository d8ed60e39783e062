"""Commands run one after the other, each in a process of its own, and what became of each.

A program that tests start: `python refused.py`, commands as lines of JSON on its input, outcomes as
lines of JSON on its output. What the commands import is imported once; each then runs in a fork,
with its own memory, its own limits and its own exit code, and dies there if it hangs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

# Imported for the forks, so that none of them waits for it.
import gguf  # noqa: F401
import tensorstore  # noqa: F401

import dsjax
from dsjax import cli
from dsjax.checkpoint import convert, gguf_tokenizer, inspect  # noqa: F401
from dsjax.serving.protocol import load_served

SECONDS = 20
"""After which a command that has not ended is killed."""

ADDRESSES = 12 << 30
"""Address space of a command, so that one without bounds fails instead of filling the machine."""


def _served(path: str) -> None:
    load_served(path, "model", vocab_size=1 << 20, context=64)


VERBS: dict[str, Callable[[str], Any]] = {
    "load": lambda path: dsjax.load(path, "bfloat16"),
    "load_tokenizer": lambda path: dsjax.load_tokenizer(path),
    "serve": _served,
}
"""What is no verb of the command line, and ends as one would."""


def outcome(arguments: list[str]) -> dict[str, Any]:
    """Exit code, both streams, peak memory in bytes, and seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            _run(arguments)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - begin
        streams = {}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            streams[name] = file.read(100_000).decode()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, **streams, "peak": usage.ru_maxrss << 10, "seconds": seconds}


def _run(arguments: list[str]) -> None:
    """Never returns: the process ends as the command does."""
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sys.argv = ["dsjax", *arguments]
    verb, *rest = arguments
    code = 1
    try:
        if verb in VERBS:
            cli.run(lambda: VERBS[verb](*rest))
        cli.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if "load" in sys.argv:
        from dsjax.checkpoint import load  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(outcome(json.loads(line))), flush=True)
