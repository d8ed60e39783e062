"""A served model without a model.

The engine says what a script says, at a pace, and remembers what it was told. It has the interface
of `dsjax.inference.engine.Engine`, also in what it refuses.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from dsjax.errors import UserError
from dsjax.inference.request import FinishReason, Request, TokenLogprob, Update
from dsjax.serving.protocol import Served

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)


Script = Callable[[Request], list[int]]


@functools.cache
def tokenizer() -> Tokenizer:
    """A token for each byte, and those of a model that thinks."""
    backend = train_tokenizer([""], 261)._backend
    backend.add_tokens(["<think>", "</think>"])
    return Tokenizer(backend, BOS, EOS)


def make_served(chat: bool = True, context: int = 512) -> Served:
    """What the protocol is told of the model "m"."""
    names = {"bos_token": BOS, "eos_token": EOS}
    return Served(
        name="m",
        tokenizer=tokenizer(),
        vocab_size=263,
        context=context,
        template=ChatTemplate(TEMPLATE, tokenizer(), names) if chat else None,
        think_start_id=tokenizer().added_tokens["<think>"],
        think_end_id=tokenizer().added_tokens["</think>"],
    )


def backwards(request: Request) -> list[int]:
    """The prompt from its end, again and again: no two clients get the same by mistake."""
    n = len(request.tokens)
    return [request.tokens[-1 - i % n] for i in range(request.sampling.max_tokens)]


@dataclasses.dataclass(frozen=True)
class Stats:
    """The fields of `EngineStats`, which would bring jax along; `test_worker.py` compares them."""

    running: int
    waiting: int
    cache_usage: float
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    drafted: int
    accepted: int
    preempted: int


class ScriptedEngine:
    """Says `script(request)`, one token a step, to the first `rows` requests."""

    def __init__(
        self,
        script: Script = backwards,
        *,
        rows: int = 64,
        context: int = 512,
        eos: int | None = None,
        step_seconds: float = 0.0005,
        warm_up_seconds: float = 0.0,
    ):
        self.script = script
        self.rows = rows
        self.context = context
        self.eos = eos
        self.step_seconds = step_seconds
        self.warm_up_seconds = warm_up_seconds
        self.fail_at_step: int | None = None
        self.submitted: list[str] = []
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.steps = self.generated = self.prompt_tokens = 0
        self._open: dict[str, tuple[Request, list[int], int]] = {}
        self._owner: int | None = None

    def submit(self, request: Request) -> None:
        self._check_owner()
        if len(request.tokens) >= self.context:
            raise UserError(f"the prompt has {len(request.tokens)} tokens; at most {self.context}")
        assert request.id not in self.submitted
        self.submitted.append(request.id)
        self._open[request.id] = request, self.script(request), 0

    def cancel(self, request_id: str) -> None:
        self._check_owner()
        if self._open.pop(request_id, None):
            self.cancelled.append(request_id)

    @property
    def idle(self) -> bool:
        return not self._open

    @property
    def open(self) -> int:
        return len(self._open)

    def step(self) -> list[Update]:
        self._check_owner()
        self.steps += 1
        if self.fail_at_step is not None and self.steps >= self.fail_at_step:
            raise RuntimeError("the device is on fire")
        time.sleep(self.step_seconds)
        return [self._advance(request_id) for request_id in list(self._open)[: self.rows]]

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self._check_owner()
        progress(1, 3)
        time.sleep(self.warm_up_seconds)
        progress(3, 3)

    def stats(self) -> Stats:
        running = min(len(self._open), self.rows)
        return Stats(
            running=running,
            waiting=len(self._open) - running,
            cache_usage=running / self.rows,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
            prefix_queries=self.prompt_tokens,
            prefix_hits=0,
            drafted=0,
            accepted=0,
            preempted=0,
        )

    def _advance(self, request_id: str) -> Update:
        request, script, done = self._open[request_id]
        token = script[done]
        self._open[request_id] = request, script, done + 1
        self.generated += 1
        finish: FinishReason | None = None
        if token == self.eos and not request.sampling.ignore_eos:
            finish = "stop"
        elif done + 1 in (len(script), request.sampling.max_tokens):
            finish = "length"
        if finish:
            del self._open[request_id]
            self.finished.append(request_id)
        if done == 0:
            self.prompt_tokens += len(request.tokens)
        return Update(
            request_id,
            (token,),
            finish,
            logprobs=_logprobs(token, request.sampling.logprobs),
            prompt_logprobs=_prompt_logprobs(request) if done == 0 else (),
        )

    def _check_owner(self) -> None:
        """Whoever comes first owns it; nobody else may touch it."""
        thread = threading.get_ident()
        self._owner = self._owner or thread
        assert thread == self._owner, "the engine was touched by a second thread"


def _logprobs(token: int, wanted: int | None) -> tuple[TokenLogprob, ...]:
    if wanted is None:
        return ()
    return (TokenLogprob(token, -0.5, tuple((token + i, -0.5 - i) for i in range(wanted))),)


def _prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...]:
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return ()
    return (None, *(_logprobs(token, wanted)[0] for token in request.tokens[1:]))
