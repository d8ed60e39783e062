"""The thread that owns the engine: it alone touches it, and it speaks with a loop by messages.

Calls come in through an inbox and are obeyed between two steps; what happens goes out to a
`Listener`, whose methods are called on the event loop, in order.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from dsjax.errors import UserError
from dsjax.inference.request import Request, Update
from dsjax.serving.metrics import End, Metrics, Stopwatch

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine, EngineStats

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who hears what happens to requests."""

    def accepted(self, ids: Collection[str]) -> None:
        """The engine has taken these."""

    def refused(self, ids: Collection[str], reason: UserError) -> None:
        """The engine cannot take these."""

    def made(self, updates: list[Update]) -> None:
        """One step made this."""

    def forgotten(self, ids: Collection[str]) -> None:
        """Those of these that still ran are cancelled."""

    def failed(self) -> None:
        """Nothing will ever come again."""


class EngineThread(threading.Thread):
    """Warms the engine up, then steps it as long as there is something to do.

    `warm`, `compiled` (so many programs of so many), `broken` and `stats` are written by the
    thread and may be read by anyone.
    """

    def __init__(self, engine: Engine, metrics: Metrics):
        # A daemon: a program that hangs on the device must not keep the process alive.
        super().__init__(name="engine", daemon=True)
        self._engine = engine
        self._metrics = metrics
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._running: dict[str, Stopwatch] = {}
        self.stats: EngineStats = engine.stats()
        self.warm = False
        self.compiled = (0, 0)
        self.broken = False
        metrics.watch(lambda: self.stats)

    def start_for(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        """Start, and tell this listener on this loop."""
        self._listener = listener
        self._loop = loop
        self.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Give these to the engine, all or none."""
        self._inbox.put(partial(self._submit, requests, time.monotonic()))

    def cancel(self, ids: Collection[str], end: End) -> None:
        """Take these from the engine; they end as `end`."""
        self._inbox.put(partial(self._cancel, ids, end))

    def stop(self) -> None:
        """Leave after the step that runs now."""
        self._inbox.put(None)

    def run(self) -> None:
        """What the thread does; nobody else calls it."""
        try:
            began = time.monotonic()
            self._engine.warm_up(self._warming)
            self.warm = True
            logger.info("ready after %.0f s of warming up", time.monotonic() - began)
            while self._obey():
                if not self._engine.idle:
                    self._step()
                self.stats = self._engine.stats()
        except BaseException:  # whatever it is, nobody shall wait for ever
            logger.exception("the engine has failed; nothing is answered from now on")
            self.broken = True
            for watch in self._running.values():
                watch.end("error")
            # What is still in the inbox is not running, but its client is told like all others.
            self._tell(self._listener.failed)

    def _warming(self, done: int, total: int) -> None:
        self.compiled = done, total

    def _obey(self) -> bool:
        """Do what the inbox says; wait for it when the engine is idle. False: stop."""
        for message in self._messages():
            if message is None:
                return False
            message()
        return True

    def _messages(self) -> Iterator[Callable[[], None] | None]:
        if self._engine.idle:
            yield self._inbox.get()
        while not self._inbox.empty():
            yield self._inbox.get()

    def _submit(self, requests: Sequence[Request], since: float) -> None:
        ids = [request.id for request in requests]
        for request in requests:
            try:
                self._engine.submit(request)
            except UserError as reason:
                self._forget(ids)
                self._tell(self._listener.refused, ids, reason)
                return
            self._running[request.id] = Stopwatch(self._metrics, len(request.tokens), since)
        self._tell(self._listener.accepted, ids)

    def _cancel(self, ids: Collection[str], end: End) -> None:
        for watch in self._forget(ids):
            watch.end(end)
        self._tell(self._listener.forgotten, ids)

    def _forget(self, ids: Collection[str]) -> list[Stopwatch]:
        """Take those of them that still run from the engine."""
        running = [request_id for request_id in ids if request_id in self._running]
        for request_id in running:
            self._engine.cancel(request_id)
        return [self._running.pop(request_id) for request_id in running]

    def _step(self) -> None:
        updates = self._engine.step()
        for update in updates:
            watch = self._running[update.request_id]
            watch.tokens(len(update.tokens))
            if update.finish:
                del self._running[update.request_id]
                watch.end(update.finish)
        self._tell(self._listener.made, updates)

    def _tell(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed: nobody listens any more")
