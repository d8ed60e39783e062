"""An engine that answers by a script, and an evaluation over it that takes no time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dsjax.evaluation.run import run_eval
from dsjax.evaluation.settings import Room, Settings
from dsjax.inference import opening
from dsjax.inference.request import FinishReason, Request, Update

Script = Callable[[Request], list[int]]


def babble(request: Request) -> list[int]:
    """Some printable bytes, by the prompt and the seed alone; now and then it goes on for ever."""
    rng = random.Random(f"{request.tokens} {request.sampling.seed}")
    return [rng.randrange(40, 80) for _ in range(rng.randrange(1, 40))]


class ScriptedEngine:
    """Gives `script(request)` in pieces of three tokens; what is too long is cut, as by a limit."""

    def __init__(self, script: Script = babble, rows: int = 4, steps: int | None = None):
        self.settings = SimpleNamespace(rows=rows)
        self.script = script
        self.steps = steps
        self.submitted: list[Request] = []
        self._open: dict[str, tuple[int, list[int]]] = {}
        """Of each request: how many tokens it may still have, and what it has yet to say."""

    def submit(self, request: Request) -> None:
        assert request.id not in [other.id for other in self.submitted]
        self.submitted.append(request)
        self._open[request.id] = request.sampling.max_tokens, self.script(request)

    def cancel(self, name: str) -> None:
        del self._open[name]

    def step(self) -> list[Update]:
        if self.steps is not None:
            self.steps -= 1
            if self.steps < 0:
                raise KilledError
        return [self._advance(name) for name in list(self._open)[: self.settings.rows]]

    def _advance(self, name: str) -> Update:
        room, tokens = self._open.pop(name)
        new, rest = tokens[: min(3, room)], tokens[min(3, room) :]
        finish: FinishReason | None = None
        if not rest:
            finish = "stop"
        elif len(new) == room:
            finish = "length"
        else:
            self._open = {name: (room - len(new), rest), **self._open}
        return Update(name, tuple(new), finish)


class KilledError(Exception):
    """Nobody catches it: what is written then is what a kill would leave."""


def evaluate(
    monkeypatch: Any,
    engine: ScriptedEngine,
    checkpoint: Path,
    output: Path,
    *tasks: str,
    limit: int | None = 5,
    **settings: Any,
) -> None:
    """`dsjax eval` over the scripted engine."""
    monkeypatch.setattr(opening, "open_engine", lambda *_, **__: engine)
    drawing = Settings(**{"k": 3, "max_tokens": 24, **settings})
    run_eval(checkpoint, tasks, drawing, Room(), limit=limit, output=output)
