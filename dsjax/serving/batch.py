"""`serve.py batch`: a file of requests in, a file of answers out, in OpenAI's batch format.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

A line that cannot be answered gets a record that says why, and the others are done.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from dsjax.errors import UserError
from dsjax.inference.request import LARGEST_SEED, Update
from dsjax.places import local_path
from dsjax.serving.batch_files import (
    MAX_LINE,
    Line,
    Records,
    key_of,
    open_records,
    read_lines,
    survey,
)
from dsjax.serving.job import Job, parse
from dsjax.serving.json_body import parse_object
from dsjax.serving.options import ModelOptions
from dsjax.serving.protocol import RequestError, Served
from dsjax.training.progress import ThroughputDisplay
from dsjax.training.signals import Termination, catch_termination

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine

QUEUE = 2
"""Sequences that are open at once, for each row of the engine: one runs, and one waits."""


def run_batch(source: Path, output: Path, model: ModelOptions) -> None:
    """Answer every line of `source` in `output`, going on where an earlier call was stopped.

    Raises:
        UserError: a file that cannot be used, or another process at the same output.
        SystemExit: 143 or 130, after SIGTERM or SIGINT; what is answered is kept.
    """
    source, output = local_path(source, "--input"), local_path(output, "--output")
    console = Console()
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    found = survey(source, model.name)
    records = open_records(output, found)
    if records is None:
        say(f"{output}: is there already, whole; nothing to do")
        return
    with records:
        if before := len(records.done):
            say(f"{records.partial}: going on after {before:,} of {found.lines:,} requests")
        if not records.whole:
            # Imported late: what is done already, or cannot be, is said without waiting for jax.
            from dsjax.serving.opening import open_model

            batch = Batch(*open_model(model), records)
            asked = _answer(
                batch, source, ThroughputDisplay("requests", found.lines, before, console)
            )
            if asked.received is not None and not records.whole:
                say(f"stopped: {len(records.done):,} of {found.lines:,} requests are in "
                    f"{records.partial}; the same command goes on")  # fmt: skip
                sys.exit(128 + asked.received)
            say(f"{batch.answered:,} answered, {batch.refused:,} refused")
        records.finish()
    say(f"{output}: {found.lines:,} records")


def _answer(batch: Batch, source: Path, progress: ThroughputDisplay) -> Termination:
    """Step until all is done or a signal asks to stop."""
    with catch_termination() as asked, progress:
        for tokens in batch.run(read_lines(source)):
            progress.update(batch.done, tokens)
            if asked.received is not None:
                break
    return asked


class _Asked(NamedTuple):
    """A line that is on its way through the engine."""

    key: bytes
    custom_id: str
    job: Job


class Batch:
    """Lines over one engine: `QUEUE` keeps it busy, and bounds what is held in memory."""

    def __init__(self, engine: Engine, served: Served, records: Records):
        self._engine = engine
        self._served = served
        self._records = records
        self._most = QUEUE * engine.settings.rows
        self._open: dict[str, _Asked] = {}
        self._met: set[bytes] = set()
        self.answered = 0
        self.refused = 0

    @property
    def done(self) -> int:
        """Records that are written, earlier calls' too."""
        return len(self._records.done)

    def run(self, lines: Iterable[Line]) -> Iterator[int]:
        """Answer all lines; after each bit of work yields the tokens made so far."""
        waiting = iter(lines)
        while True:
            if len(self._open) < self._most and (line := next(waiting, None)):
                self._begin(line)
            elif self._open:
                for update in self._engine.step():
                    self._take(update)
            else:
                return
            yield self._engine.stats().generated_tokens

    def _begin(self, line: Line) -> None:
        """Bring a line to the engine, unless it is answered already or cannot be."""
        try:
            asked = _read(line)
            custom_id = _custom_id(asked)
            key = key_of(custom_id)
            if key in self._met:
                message = f"custom_id {custom_id[:80]!a} stands in an earlier line too"
                raise RequestError(400, message, "custom_id", "duplicate_custom_id")
        except RequestError as error:
            # Not under a custom_id: each of these stands in one record only.
            where = f"line {line.number}: {error.message}"
            found = RequestError(error.status, where, error.param, error.code)
            self._refuse(key_of(line.number), None, found)
            return
        self._met.add(key)
        if key not in self._records.done:
            try:
                self._submit(_Asked(key, custom_id, self._job(asked, key)))
            except RequestError as error:
                self._refuse(key, custom_id, error)

    def _job(self, asked: dict[str, Any], key: bytes) -> Job:
        """What a line's body asks for; without a seed, one that depends on the custom_id alone."""
        if asked.get("method") != "POST":
            raise RequestError(400, "method: expected POST", "method", "invalid_method")
        url, body = asked.get("url"), asked.get("body")
        if not isinstance(url, str):
            raise RequestError(400, "url: expected a string", "url", "invalid_url")
        if isinstance(body, dict) and body.get("stream"):
            raise RequestError(400, "stream: a batch has nothing to stream to", "stream")
        draw = partial(random.Random(key).randrange, LARGEST_SEED + 1)
        return parse(url, body, self._served, key.hex(), random_seed=draw)

    def _submit(self, asked: _Asked) -> None:
        """Give the engine all sequences of a job, or none."""
        for request in asked.job.requests:
            try:
                self._engine.submit(request)
            except UserError as error:
                self._forget(asked)
                raise RequestError(400, str(error)) from None
            self._open[request.id] = asked

    def _forget(self, asked: _Asked) -> None:
        for request in asked.job.requests:
            self._engine.cancel(request.id)
            self._open.pop(request.id, None)

    def _take(self, update: Update) -> None:
        """Give what the engine made to its job, and write the answer when it is whole."""
        asked = self._open[update.request_id]
        job = asked.job
        job.feed(update)
        for request_id in job.stopped:
            self._engine.cancel(request_id)
        if update.finish or update.request_id in job.stopped:
            del self._open[update.request_id]
        if job.done:
            self.answered += 1
            self._write(asked.key, asked.custom_id, 200, job.response(), None)

    def _refuse(self, key: bytes, custom_id: str | None, error: RequestError) -> None:
        if key in self._records.done:
            return
        self.refused += 1
        said = {"code": error.code or "invalid_request_error", "message": error.message}
        self._write(key, custom_id, error.status, error.body(), said)

    def _write(
        self,
        key: bytes,
        custom_id: str | None,
        status: int,
        body: dict[str, Any],
        error: dict[str, str] | None,
    ) -> None:
        response = {"status_code": status, "request_id": key.hex(), "body": body}
        record = {"custom_id": custom_id, "response": response, "error": error}
        self._records.write(key, record)


def _read(line: Line) -> dict[str, Any]:
    """A line as a JSON object."""
    if line.data is None:
        raise RequestError(400, f"is longer than {MAX_LINE} bytes", code="invalid_json_line")
    try:
        return parse_object(line.data)
    except ValueError as error:
        raise RequestError(400, str(error), code="invalid_json_line") from None


def _custom_id(asked: dict[str, Any]) -> str:
    found = asked.get("custom_id")
    if not isinstance(found, str) or not found:
        problem = "custom_id is missing, or no string"
        raise RequestError(400, problem, "custom_id", "missing_custom_id")
    return found
