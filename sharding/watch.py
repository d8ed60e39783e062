"""Who is still there: every process hears within a minute that another one is lost, and leaves.

Each process counts a number up in the coordination service, which process 0 serves. Process 0 looks
whose number stands still, and writes there why all have to leave: the word of the end. Everybody
looks for that word, prints it on one line, and ends. Nobody waits for a collective that cannot
complete, and nobody has to read the C++ library's account of a lost connection.

The library has a watch of its own, slower than this one, which aborts a process without a word of
ours. It is the only one to notice that process 0, and the service with it, is gone; `on_abort` says
that on one line, and turns the abort into exit code `LOST`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from jax.errors import JaxRuntimeError

from dsjax.errors import one_line

LOST = 75
"""Exit code when another process, or a device, is lost: starting all processes again helps.

EX_TEMPFAIL of sysexits.h. The files of deploy/ start a run again on this code, and not on 1 or 2.
"""

_TRANSIENT = ("ABORTED", "CANCELLED", "DATA_LOSS", "DEADLINE_EXCEEDED", "UNAVAILABLE")
"""Statuses of the runtime's errors that mean a broken connection or device, not a wrong program."""

LOST_SECONDS = 40.0
"""Silence after which a process counts as lost."""

TROUBLED_SECONDS = 12.0
"""The same once some process reports a fault: most often, it is that it no longer hears another."""

_leaving = threading.Lock()


def leave(text: str | None, code: int) -> NoReturn:
    """End this process at once, with one line and without waiting for anybody."""
    if not _leaving.acquire(blocking=False):
        time.sleep(60)  # another thread is at it
    sys.stdout.flush()
    if text is not None:
        print(f"error: {one_line(text)}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


class Watch:
    """The watch of one process over all, in a thread of its own."""

    def __init__(self, client: Any, process: int, count: int) -> None:
        self._client = client
        self._process = process
        # A service that answers some hundred questions a second is hardly at work.
        self._period = min(max(count / 128, 1.0), 8.0)
        self._heard = {other: ("", time.monotonic()) for other in range(count)}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        client.key_value_set(f"dsjax/host/{process}", socket.gethostname())
        self._thread.start()

    def name(self, process: int) -> str:
        """A process as people look for it: its number, of how many, and its host."""
        return name_of(self._client, process, len(self._heard))

    def stop(self) -> None:
        """Watch no longer: all have done their work."""
        self._stopped.set()
        self._thread.join()

    def end_all(self, text: str, code: int) -> NoReturn:
        """End this process with a line, and all others with the same one and this one's name."""
        self._stopped.set()  # or it might hear its own word, and say that instead
        self._write_end(f"{self.name(self._process)}: {text}", code)
        if self._process == 0:  # without it nobody could read the word
            time.sleep(2.5 * self._period)
        leave(text, code)

    def fail(self, error: BaseException) -> NoReturn:
        """Leave after an exception: with who is lost, if that was its cause, or its traceback.

        The exit code is 1; `LOST` for an error of the runtime that another start may not meet.
        """
        transient = isinstance(error, JaxRuntimeError) and str(error).startswith(_TRANSIENT)
        self._client.key_value_set(f"dsjax/trouble/{self._process}", "", True)
        self._stopped.wait(TROUBLED_SECONDS + 3 * self._period)  # the word may come in this time
        with _leaving:
            traceback.print_exception(error)
        self.end_all(f"{type(error).__name__}: {error}", LOST if transient else 1)

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(self._period):
            beats += 1
            try:
                self._client.key_value_set(f"dsjax/beat/{self._process}", str(beats), True)
                end = self._client.key_value_dir_get("dsjax/end/")
                if not end and self._process == 0:
                    self._look()
            # What it raises for a lost connection is no class of its own.
            except Exception as error:
                if not self._stopped.is_set():
                    count = len(self._heard)
                    leave(f"lost process 0 of {count}, which coordinates: {error}", LOST)
                return
            if end and not self._stopped.is_set():
                self._stopped.wait(2.5 * self._period if self._process == 0 else 0.0)
                leave(**json.loads(end[0][1]))

    def _look(self) -> None:
        """Write the end when somebody has been silent for too long."""
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get("dsjax/beat/"):
            other = int(key.rpartition("/")[2])
            if self._heard[other][0] != beat:
                self._heard[other] = beat, now
        trouble = self._client.key_value_dir_get("dsjax/trouble/")
        limit = max(TROUBLED_SECONDS if trouble else LOST_SECONDS, 3 * self._period)
        silent = [other for other, (_, heard) in self._heard.items() if now - heard > limit]
        if silent:
            named = ", ".join(self.name(other) for other in silent)
            self._write_end(
                f"lost {named}: not heard of for {limit:.0f} s, killed or out of reach; "
                "start all again, and the run goes on from its newest checkpoint",
                LOST,
            )

    def _write_end(self, text: str, code: int) -> None:
        try:
            self._client.key_value_set("dsjax/end/why", json.dumps({"text": text, "code": code}))
        except Exception as error:  # the first word is kept
            if "ALREADY_EXISTS" not in str(error):
                raise


def name_of(client: Any, process: int, count: int) -> str:
    """`process 1 of 4 (its host)`; without the host if it never came."""
    hosts = dict(client.key_value_dir_get("dsjax/host/"))
    host = hosts.get(f"dsjax/host/{process}")
    return f"process {process} of {count}" + (f" ({host})" if host else "")


_abort_handler: Any = None  # kept: what C calls must not be collected


def on_abort(explain: Callable[[], str | None]) -> None:
    """When the C++ library aborts this process, leave with what `explain` says and code `LOST`.

    If it says nothing the abort goes on. A handler of Python's `signal` would be too late: abort()
    does not return to the interpreter. This one runs within abort(), in the thread that called
    it, which holds no lock of the interpreter's.
    """
    global _abort_handler

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        text = explain()
        if text is not None:
            leave(text, LOST)

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, type(handler)], ctypes.c_void_p
    set_handler(signal.SIGABRT, handler)
    _abort_handler = handler
