"""What stands between the port and the engine's thread: admission, delivery, and the end.

    the event loop                          the engine's thread
    worker.subscribe(requests)   ------>    engine.submit
    subscription.stop(ids)       ------>    engine.cancel
    await subscription.updates() <------    engine.step

All of this module lives on the event loop; nothing here is shared, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Self

from dsjax.errors import UserError
from dsjax.inference.request import Request, Update
from dsjax.serving.engine_thread import EngineThread
from dsjax.serving.metrics import End, Metrics
from dsjax.serving.protocol import RequestError

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine

logger = logging.getLogger(__name__)

LAST_STEP_SECONDS = 5.0
"""How long a stopping server waits for the device to finish its last program."""


class Worker:
    """Takes as many sequences as it may, and brings each client what the engine makes for it."""

    def __init__(self, engine: Engine, metrics: Metrics, max_open: int):
        self.metrics = metrics
        self._thread = EngineThread(engine, metrics)
        self._max_open = max_open
        self._places: dict[str, Subscription] = {}
        """The sequences that the engine has or will have: what `max_open` bounds."""
        self._subscriptions: set[Subscription] = set()
        self._draining = False

    def start(self) -> None:
        """Begin to warm up; returns at once."""
        self._thread.start_for(self, asyncio.get_running_loop())

    def trouble(self) -> RequestError | None:
        """Why no request can be taken now; None when all is well."""
        if self._thread.broken:
            return _engine_failed()
        if self._draining:
            return RequestError(503, "the server is shutting down", code="shutting_down")
        if not self._thread.warm:
            done, total = self._thread.compiled
            message = f"the server is warming up: {done} of {total or '?'} programs are compiled"
            return RequestError(503, message, code="warming_up")
        return None

    def subscribe(self, requests: Sequence[Request]) -> Subscription:
        """Hand sequences to the engine.

        Raises:
            RequestError: 500 or 503 when there is trouble, 429 when too many sequences are open.
        """
        if trouble := self.trouble():
            raise trouble
        if len(requests) > self._max_open:
            message = f"this makes {len(requests)} sequences; {self._max_open} at once are possible"
            raise RequestError(400, message, code="too_many_sequences")
        if len(self._places) + len(requests) > self._max_open:
            message = f"{len(self._places)} of {self._max_open} places are taken; try again later"
            raise RequestError(429, message, code="too_many_requests")
        subscription = Subscription(self, [request.id for request in requests])
        self._subscriptions.add(subscription)
        self._places |= {request.id: subscription for request in requests}
        self._thread.submit(requests)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Nobody listens there any more."""
        self._subscriptions.discard(subscription)

    def cancel(self, ids: Collection[str], end: End) -> None:
        """These need not go on; their places are free when the engine has forgotten them."""
        self._thread.cancel(ids, end)

    async def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Take nothing new, let what runs finish for so long or until `hurry`, then stop."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._subscriptions and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.02)
        self._fail_all(RequestError(503, "the server has shut down", code="shutting_down"))
        self._thread.stop()
        deadline = time.monotonic() + LAST_STEP_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(0.02)
        if self._thread.is_alive():
            logger.warning("the device is still busy; leaving without waiting for it")

    def is_alive(self) -> bool:
        """Whether the engine's thread still runs; after `drain` it should not."""
        return self._thread.is_alive()

    # What the thread tells: this is its `Listener`.

    def accepted(self, ids: Collection[str]) -> None:
        """The engine has taken one client's sequences."""
        for subscription in {self._places[request_id] for request_id in ids}:
            subscription.accept()

    def refused(self, ids: Collection[str], reason: UserError) -> None:
        """The engine cannot take one client's sequences."""
        for subscription in {self._places.pop(request_id) for request_id in ids}:
            subscription.fail(RequestError(400, str(reason)))

    def made(self, updates: list[Update]) -> None:
        """What one step made, to those for whom it was made."""
        for update in updates:
            subscription = self._places[update.request_id]
            if update.finish:
                del self._places[update.request_id]
            subscription.deliver(update)

    def forgotten(self, ids: Collection[str]) -> None:
        """The places of cancelled sequences are free."""
        for request_id in ids:
            self._places.pop(request_id, None)

    def failed(self) -> None:
        """Nobody waits for an engine that is gone."""
        self._fail_all(_engine_failed())

    def _fail_all(self, error: RequestError) -> None:
        for subscription in self._subscriptions:
            subscription.fail(error)


class Subscription:
    """The sequences of one HTTP request, and what comes of them, in order.

    A context: when it is left, whatever of it still runs is cancelled in the engine.
    """

    def __init__(self, worker: Worker, ids: Collection[str]):
        self._worker = worker
        self._open = set(ids)
        self._accepted = False
        self._updates: list[Update] = []
        self._error: RequestError | None = None
        self._news = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.leave(self)
        self.stop(self._open, "abort")

    async def accepted(self) -> None:
        """Wait until the engine has taken all sequences, or raise why it has not."""
        while not (self._accepted or self._error):
            await self._next()
        if self._error:
            raise self._error

    async def updates(self, patience: float | None = None) -> list[Update]:
        """What has come since the last call; empty after `patience` seconds of silence.

        Raises:
            RequestError: what had come has been given, and nothing more will come.
        """
        try:
            async with asyncio.timeout(patience):
                while not (self._updates or self._error):
                    await self._next()
        except TimeoutError:
            return []
        updates, self._updates = self._updates, []
        if self._error and not updates:
            raise self._error
        return updates

    def stop(self, ids: Collection[str], end: End = "stop") -> None:
        """These sequences need not go on; those that have ended already may be among them."""
        ids = self._open & set(ids)
        self._open -= ids
        if ids:
            self._worker.cancel(ids, end)

    def accept(self) -> None:
        """All sequences are in the engine."""
        self._accepted = True
        self._news.set()

    def deliver(self, update: Update) -> None:
        """The engine made this. What was under way to a stopped sequence is dropped."""
        if update.request_id in self._open:
            if update.finish:
                self._open.discard(update.request_id)
            self._updates.append(update)
            self._news.set()

    def fail(self, error: RequestError) -> None:
        """Nothing more will come."""
        self._error = error
        self._news.set()

    async def _next(self) -> None:
        await self._news.wait()
        self._news.clear()


def _engine_failed() -> RequestError:
    return RequestError(500, "the engine has failed; the server's log says why", code="failed")
