"""The engine: requests in, tokens out. Everything that generates text goes through it.

    engine = Engine(model, EngineSettings(rows=8, context=4096))
    engine.warm_up()                     # compiles all there is to compile
    engine.submit(Request("a", (0, 17, 42), SamplingParams(max_tokens=64)))
    while not engine.idle:
        for update in engine.step(): ...

Continuous batching (Orca, OSDI 2022): every step takes the rows there are; finished ones leave and
waiting ones enter between two steps. It is not safe for threads: one thread owns it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dsjax.errors import UserError
from dsjax.inference.request import Request, TokenLogprob, Update
from dsjax.inference.runner import Runner
from dsjax.inference.scheduler import Plan, Scheduler, Sequence
from dsjax.inference.settings import PAGE_SIZE, EngineSettings, EngineStats
from dsjax.inference.speculation import Speculation
from dsjax.inference.step import Logprobs, StepOutputs
from dsjax.model.decoder import Decoder
from dsjax.model.transformer import Transformer


class Engine:
    """Runs requests over one model.

    Args:
        model: on a device, or sharded over a mesh: the batch then goes over the mesh's batch axes,
            each part with rows and pages of its own. The engine holds a copy of the weights; of
            what `load_decoder` loaded, the weights themselves.
        settings: how much room there is.
        vocab_size: ids from here on are never sampled; a tokenizer can know fewer than the model.
    """

    def __init__(
        self,
        model: Transformer | Decoder,
        settings: EngineSettings,
        *,
        vocab_size: int | None = None,
    ):
        config = model.config
        if settings.context > config.max_position_embeddings:
            raise UserError(
                f"context is {settings.context}; the model's max_position_embeddings is "
                f"{config.max_position_embeddings}: choose at most that"
            )
        self.settings = settings
        self.config = config
        self._runner = runner = Runner(model, settings, vocab_size or config.vocab_size)
        self._scheduler = Scheduler(
            runner.groups, runner.rows, runner.pages, PAGE_SIZE, runner.shapes
        )
        self._speculation = Speculation(runner.drafts)
        self._sequences: dict[str, Sequence] = {}
        self._counts = dict.fromkeys(
            ("prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits"), 0
        )

    def warm_up(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compile every program, so that no request waits for one.

        `progress` hears how many of how many are done.
        """
        self._runner.warm_up(progress)

    def take(self, model: Transformer) -> None:
        """Go on with other weights of the same shapes, and forget what the old ones have read.

        Raises:
            UserError: requests are on their way.
        """
        if not self.idle:
            raise UserError("the engine has requests on their way; let them finish before")
        self._runner.take(model)
        self._scheduler.forget()

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            UserError: it can never run; the message says why.
        """
        self._check(request)
        sequence = Sequence(request, list(request.tokens))
        self._sequences[request.id] = sequence
        self._scheduler.waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; no update follows. One that is finished or unknown is no error."""
        if (sequence := self._sequences.pop(request_id, None)) is not None:
            self._scheduler.leave(sequence)

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._sequences

    def step(self) -> list[Update]:
        """Run one program on the device; what it added, in no particular order."""
        for sequence in self._scheduler.enter():
            self._runner.install(sequence)
            if sequence.cached is None:
                sequence.cached = sequence.filled
                self._counts["prefix_queries"] += len(sequence.tokens)
                self._counts["prefix_hits"] += sequence.cached
        drafts = self._speculation.choose(self._scheduler.decoding_rows)
        plan = self._scheduler.plan(drafts)
        if plan is None:
            return []
        began = time.perf_counter()
        found = self._runner.run(plan)
        return self._absorb(plan, found, time.perf_counter() - began)

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done."""
        scheduler = self._scheduler
        pages = sum(pool.count for pool in scheduler.pools)
        free = sum(pool.available for pool in scheduler.pools)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            cache_usage=1 - free / pages,
            drafted=self._speculation.drafted,
            accepted=self._speculation.accepted,
            preempted=scheduler.preempted,
            **self._counts,
        )

    def _check(self, request: Request) -> None:
        context, vocab = self.settings.context, self.config.vocab_size
        if request.id in self._sequences:
            raise UserError(f"request {request.id!r} is already on its way; give each its own id")
        if not request.tokens:
            raise UserError("the prompt is empty; begin it with the bos token")
        outside = [token for token in request.tokens if not 0 <= token < vocab]
        if outside:
            raise UserError(
                f"the prompt holds token {outside[0]}, outside vocab_size={vocab}; encode it with "
                "the model's own tokenizer"
            )
        params = request.sampling
        named = [t for t in (*params.logit_bias, *params.stop_tokens) if not 0 <= t < vocab]
        if named:
            raise UserError(f"logit_bias or stop_tokens name token {named[0]}, outside {vocab}")
        if len(request.tokens) + params.max_tokens > context:
            raise UserError(
                f"the prompt has {len(request.tokens)} tokens, which with max_tokens="
                f"{params.max_tokens} go beyond the context of {context}; shorten either"
            )

    def _absorb(self, plan: Plan, found: StepOutputs, seconds: float) -> list[Update]:
        """Bring every sequence of the step up to date."""
        updates, drafted, accepted, made = [], 0, 0, 0
        for index, (sequence, count) in plan.placed():
            if plan.reading and sequence.wants_prompt_logprobs:
                _note_prompt(sequence, count, index, found.prompt_logprobs)
            valid = int(found.valid[index])
            read = count if plan.reading else valid
            if self.settings.experts:
                sequence.experts += list(found.experts[index, :read].astype(np.int16))
            sequence.filled += read
            new = found.tokens[index, :valid].tolist()
            drafted += 0 if plan.reading else count - 1
            accepted += max(valid - 1, 0)
            if new:
                update = self._extend(sequence, new, index, found)
                made += len(update.tokens)
                updates.append(update)
            else:
                self._scheduler.remember(sequence)
        self._counts["generated_tokens"] += made
        if plan.reading:
            self._counts["prompt_tokens"] += sum(c.count for _, c in plan.placed())
        else:
            self._speculation.saw(plan.rows, plan.queries - 1, drafted, accepted, made, seconds)
        return updates

    def _extend(self, sequence: Sequence, new: list[int], index: int, found: StepOutputs) -> Update:
        """Add sampled tokens to a sequence, up to where it ends."""
        params = sequence.request.sampling
        first = sequence.made == 0
        finish = None
        for number, token in enumerate(new):
            if token in params.stop_tokens or (
                token in self.config.eos_token_ids and not params.ignore_eos
            ):
                finish, new = "stop", new[: number + 1]
            elif sequence.made + number + 1 == params.max_tokens:
                finish, new = "length", new[: number + 1]
            if finish:
                break
        sequence.tokens += new
        sequence.filled = min(sequence.filled, len(sequence.tokens) - 1)
        sequence.drafts = tuple(found.drafts[index].tolist())
        self._scheduler.remember(sequence)
        if finish:
            del self._sequences[sequence.request.id]
            self._scheduler.leave(sequence)
        return Update(
            sequence.request.id,
            tuple(new),
            finish,
            _token_logprobs(new, index, found.logprobs, params.logprobs),
            tuple(sequence.prompt_logprobs) if first else (),
            drawn_logprobs=_drawn(new, index, found, params.logprobs),
            cached_tokens=sequence.cached or 0 if first else 0,
            experts=_experts_of(sequence) if finish and self.settings.experts else None,
        )


def _note_prompt(sequence: Sequence, count: int, index: int, found: Logprobs | None) -> None:
    """Keep what a chunk says of the prompt's tokens; place i speaks of token i + 1."""
    assert found is not None  # steps that read prompts have them
    if sequence.filled == 0:
        sequence.prompt_logprobs = [None]
    after = sequence.tokens[sequence.filled + 1 : sequence.filled + 1 + count]
    wanted = sequence.request.sampling.prompt_logprobs
    sequence.prompt_logprobs += _token_logprobs(after, index, found, wanted)


def _drawn(
    tokens: list[int], index: int, found: StepOutputs, wanted: int | None
) -> tuple[float, ...]:
    return () if wanted is None else tuple(found.drawn_logprobs[index, : len(tokens)].tolist())


def _experts_of(sequence: Sequence) -> np.ndarray:
    """Of every token but the last; what was read behind a stop does not count."""
    return np.stack(sequence.experts[: len(sequence.tokens) - 1])


def _token_logprobs(
    tokens: list[int], index: int, found: Logprobs, wanted: int | None
) -> tuple[TokenLogprob, ...]:
    if wanted is None:
        return ()
    return tuple(
        TokenLogprob(
            token,
            float(found.chosen[index, place]),
            tuple(
                zip(
                    found.top[index, place, :wanted].tolist(),
                    found.top_values[index, place, :wanted].tolist(),
                    strict=True,
                )
            ),
        )
        for place, token in enumerate(tokens)
    )
