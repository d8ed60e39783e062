"""The answer to one job, whole or as a stream, for as long as its client stays."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsjax.inference.request import Update
from dsjax.serving.job import Job
from dsjax.serving.protocol import RequestError
from dsjax.serving.wire import dump, error_response, json_response
from dsjax.serving.worker import Subscription, Worker

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which every reader of server-sent events skips; proxies see that we live."""

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events before it passes them on
]


class Answer(Response):
    """Runs a job and sends what comes of it.

    A client that has left, also one that has only closed its sending side, is noticed at once and
    its sequences are cancelled. Until the engine has taken the job an error has a status of its
    own; in a running stream it is an event, and `[DONE]` does not follow.
    """

    def __init__(self, job: Job, worker: Worker, silence: float):
        super().__init__()
        self._job = job
        self._worker = worker
        self._silence = silence

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer until all is said or nobody listens."""
        answering = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled():
            answering.result()  # raises what went wrong on our side

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._worker.subscribe(self._job.requests) as subscription:
                await subscription.accepted()
                if self._job.stream:
                    await self._stream(subscription, send)
                    return
                while not self._job.done:
                    self._feed(await subscription.updates(), subscription)
            response = json_response(self._job.response())
        except RequestError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _stream(self, subscription: Subscription, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            sent = time.monotonic()
            while not self._job.done:
                updates = await subscription.updates(sent + self._silence - time.monotonic())
                # May be nothing yet: half a character, or what may become a stop string.
                body = b"".join(map(_event, self._feed(updates, subscription)))
                if not body and time.monotonic() - sent >= self._silence:
                    body = KEEP_ALIVE
                if body:
                    await _send_body(send, body)
                    sent = time.monotonic()
            if self._job.include_usage:
                await _send_body(send, _event(self._job.usage_chunk()))
            await _send_body(send, b"data: [DONE]\n\n", more=False)
        except RequestError as error:
            await _send_body(send, _event(error.body()), more=False)
        except Exception:
            logger.exception("a stream broke")
            await _send_body(send, _event(INTERNAL_ERROR.body()), more=False)

    def _feed(self, updates: list[Update], subscription: Subscription) -> list[dict[str, Any]]:
        chunks = [chunk for update in updates for chunk in self._job.feed(update)]
        subscription.stop(self._job.stopped)
        return chunks


INTERNAL_ERROR = RequestError(500, "a fault of the server's; its log says more", code="internal")


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _event(value: object) -> bytes:
    return b"data: " + dump(value) + b"\n\n"
