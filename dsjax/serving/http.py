"""`serve.py http`: OpenAI's API over one engine, on a private port.

security.Gate -> routes -> wire.read_object -> job.parse -> streaming.Answer <-> worker.Worker
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import h11
import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsjax.errors import UserError
from dsjax.serving.bodies import ChatBody, CompletionBody
from dsjax.serving.job import parse
from dsjax.serving.metrics import Metrics
from dsjax.serving.openapi import describe, generating, listing, looking, model_of
from dsjax.serving.page import page_response
from dsjax.serving.protocol import RequestError, Served
from dsjax.serving.reading import CHAT, COMPLETIONS, check_model
from dsjax.serving.security import Gate, check_exposure, is_loopback
from dsjax.serving.streaming import INTERNAL_ERROR, Answer
from dsjax.serving.wire import error_response, json_response, read_object
from dsjax.serving.worker import Worker

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine


@dataclasses.dataclass(frozen=True)
class HttpSettings:
    """How the port behaves."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one."""
    keys: tuple[str, ...] = ()
    """API keys; none: whoever reaches the port may use it."""
    without_key: bool = False
    """Listen beyond loopback although there is no key."""
    max_open: int = 256
    """Sequences that may run or wait at once; a request beyond them is answered with 429."""
    grace_seconds: float = 30.0
    """How long a stopping server lets running requests finish."""
    max_body: int = 8 * 2**20
    """Bytes of a request's body."""
    head_seconds: float = 60.0
    """How long a connection may take to bring a request's head."""
    body_seconds: float = 60.0
    """How long a body may take to arrive."""
    keep_alive_seconds: float = 10.0
    """After so long a silence in a stream a comment is sent."""


def run_http(engine: Engine, served: Served, settings: HttpSettings) -> None:
    """Listen until SIGTERM or Ctrl-C, finish what runs, return.

    Raises:
        UserError: the port is taken, or would be open to strangers.
        KeyboardInterrupt: Ctrl-C, once all is drained.
    """
    check_exposure(settings.host, settings.keys, without_key=settings.without_key)
    # Libraries that loading a model imports leave a handler of their own: ours takes its place.
    logging.basicConfig(
        force=True, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    with listen(settings) as listener, _sigterm_is_no_failure():
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        logging.getLogger(__name__).info("http://%s:%d (Ctrl-C stops)", shown, port)
        server = HttpServer(engine, served, settings)
        try:
            server.run([listener])
        except KeyboardInterrupt:
            if server.worker.is_alive():
                _leave_at_once(130)
            raise
        if server.worker.is_alive():
            _leave_at_once(0)


def _leave_at_once(code: int) -> NoReturn:
    """Leave while the engine's thread is still in a program: a long compilation, a hung device.

    Python cannot: it would end the thread inside of C++, and that ends the process by SIGABRT.
    """
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def listen(settings: HttpSettings) -> socket.socket:
    """The listening socket, made before anything slow begins."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {error}") from error
    # Connections inherit it. asyncio would set it only on a socket that names its protocol; without
    # it what follows an answer's head, and each piece of a stream, waits up to 40 ms for the
    # client's acknowledgement of what came before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn with our app; it starts the worker, and drains it while the last streams finish."""

    def __init__(self, engine: Engine, served: Served, settings: HttpSettings):
        metrics = Metrics(served.name, served.context)
        self.worker = Worker(engine, metrics, settings.max_open)
        self._grace = settings.grace_seconds
        config = uvicorn.Config(
            make_app(self.worker, served, settings),
            loop="asyncio",
            http=_limit_heads(settings.head_seconds),  # h11 bounds their size
            ws="none",
            lifespan="off",  # `startup` and `shutdown` below are it
            log_config=None,
            # Longer than clients keep idle connections: none is closed just as it is used again.
            timeout_keep_alive=75,
            proxy_headers=False,
            server_header=False,
            # Streams end by the worker's word at the end of the grace; this is for readers that
            # do not take what they are sent.
            timeout_graceful_shutdown=math.ceil(settings.grace_seconds) + 2,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer from now on, and warm up meanwhile."""
        await super().startup(sockets)
        self.worker.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing new, finish what runs, then stop the engine's thread."""
        drained = asyncio.create_task(self.worker.drain(self._grace, lambda: self.force_exit))
        await super().shutdown(sockets)
        await drained


def _limit_heads(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol over h11, but a connection that owes a request is not waited for.

    uvicorn limits how long a connection may be silent between two requests, and any byte ends that
    limit. Here it has `seconds` to complete a request's head, or the rest of a body whose request
    is answered already. While an answer is under way nothing is limited: `wire.py` and `Answer`
    see to that. Who is too late is cut off without a word, as after a silence.
    """

    class LimitedHeads(H11Protocol):
        _limit: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            owes = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
            if not owes or self.transport.is_closing():
                self._forget()
            elif self._limit is None:
                self._limit = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

        def _forget(self) -> None:
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None

    return LimitedHeads


def make_app(worker: Worker, served: Served, settings: HttpSettings) -> FastAPI:
    """All routes, behind the gate."""
    app = FastAPI(title="dsjax", docs_url=None, redoc_url=None, redirect_slashes=False)
    # A browser page whose name was rebound to 127.0.0.1 says that name. With a key it would need
    # the key as well, and an open port does not know its own names.
    guarded = is_loopback(settings.host) and not settings.keys
    hosts = {"localhost", "127.0.0.1", "::1", settings.host} if guarded else None
    app.add_middleware(HeadAsGet)
    app.add_middleware(Gate, keys=settings.keys, hosts=hosts)
    describe(app, served)
    _add_errors(app)
    _add_generation(app, worker, served, settings)
    _add_looks(app, worker, served)
    return app


def _add_generation(app: FastAPI, worker: Worker, served: Served, settings: HttpSettings) -> None:
    """The two routes that make text."""

    async def generate(request: Request, endpoint: str) -> Response:
        body = await read_object(request, limit=settings.max_body, seconds=settings.body_seconds)
        if trouble := worker.trouble():
            raise trouble  # before the work of tokenizing
        # On another thread: a long prompt takes the tokenizer a while.
        job = await asyncio.to_thread(parse, endpoint, body, served, uuid.uuid4().hex)
        return Answer(job, worker, settings.keep_alive_seconds)

    @app.post(COMPLETIONS, **generating(CompletionBody, "text_completion", "text_completion"))
    async def completions(request: Request) -> Response:
        """Go on with a text."""
        return await generate(request, COMPLETIONS)

    @app.post(CHAT, **generating(ChatBody, "chat.completion", "chat.completion.chunk"))
    async def chat_completions(request: Request) -> Response:
        """Answer in a conversation."""
        return await generate(request, CHAT)


def _add_looks(app: FastAPI, worker: Worker, served: Served) -> None:
    """The routes that only look."""
    model = {
        "id": served.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dsjax",
        "max_model_len": served.context,
        "chat_template": served.template is not None,
    }

    @app.get("/v1/models", **looking("application/json", listing()))
    async def models() -> Response:
        """The model that is served."""
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}", **model_of(served.name))
    async def one_model(request: Request) -> Response:
        """The model of this name; slashes are part of it."""
        check_model(request.path_params["model_id"], served)
        return json_response(model)

    @app.get("/health", **looking("application/json", {"type": "object"}, 503, key=False))
    async def health() -> Response:
        """Whether requests are taken; needs no key."""
        if trouble := worker.trouble():
            return error_response(RequestError(503, trouble.message, code=trouble.code))
        return json_response({"status": "ok"})

    @app.get("/metrics", **looking("text/plain", {"type": "string"}))
    async def prometheus() -> Response:
        """What Prometheus reads."""
        return Response(worker.metrics.text(), media_type=worker.metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_response()


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered in OpenAI's shape."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        what = {404: "there is no", 405: "another method is needed for"}
        path = request.url.path
        message = f"{what.get(error.status_code, error.detail)} {path}"
        if error.status_code == 404 and (meant := _meant(path, app)):
            message += f"; you may mean {meant}"
        return error_response(RequestError(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return error_response(INTERNAL_ERROR)  # uvicorn logs the traceback


def _meant(path: str, app: FastAPI) -> str | None:
    """The route that a wrong base URL misses by slashes, or by /v1 left out or written twice."""
    parts = [part for part in path.split("/") if part not in ("", "v1")]
    routes = {route.path for route in app.routes if isinstance(route, Route)}
    meant = "/".join(["", *parts]), "/".join(["", "v1", *parts])
    return next((found for found in meant if parts and found in routes), None)


class HeadAsGet:
    """Treats HEAD as GET, as monitors and proxies expect; uvicorn leaves the body out."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the method replaced."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


@contextlib.contextmanager
def _sigterm_is_no_failure() -> Iterator[None]:
    """uvicorn drains on SIGTERM and raises it again when done; here it then means nothing more."""

    def ignore(_: int, __: FrameType | None) -> None:
        pass

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, ignore)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
