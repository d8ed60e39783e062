"""Answers to questions, from the inference engine and the weights of the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsjax.config_grpo import SamplingConfig
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams, Update
from dsjax.inference.settings import EngineSettings
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from dsjax.posttraining.rows import Written
from sharding.rules import DECODE_RULES, Layout


class Sampler:
    """The engine, made once and given new weights for every rollout.

    Without drafts, so that the same questions, seeds and weights give the same bits.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        context: int,
        vocab_size: int,
        stop_tokens: tuple[int, ...] = (),
        *,
        experts: bool,
    ):
        self._sampling = sampling
        self._settings = EngineSettings(sampling.rows, context, drafts=0, experts=experts)
        self._vocab_size = vocab_size
        self._stop_tokens = stop_tokens
        self._engine: Engine | None = None

    def draw(
        self,
        model: Transformer,
        prompts: Sequence[tuple[int, ...]],
        count: int,
        seed: Sequence[int],
        stop: Callable[[], bool],
    ) -> list[list[Written]] | None:
        """`count` answers to each prompt; None if `stop` says so, which is asked at every step.

        `seed` is that of the whole rollout.
        """
        engine = self._with(model)
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts) * count)
        written: dict[str, _Growing] = {}
        # All first answers, then all second ones: by then the prompts are in the cache.
        for number in range(count):
            for question, prompt in enumerate(prompts):
                name = f"{question}/{number}"
                own = int(seeds[question * count + number])
                written[name] = _Growing()
                engine.submit(Request(name, prompt, self._params(own)))
        while not engine.idle:
            if stop():
                return None
            for update in engine.step():
                written[update.request_id].add(update)
        return [
            [written[f"{question}/{n}"].finished(prompt) for n in range(count)]
            for question, prompt in enumerate(prompts)
        ]

    def _params(self, seed: int) -> SamplingParams:
        sampling = self._sampling
        return SamplingParams(
            sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_tokens=self._stop_tokens,
            seed=seed,
            logprobs=0,
        )

    def _with(self, model: Transformer) -> Engine:
        """The engine with these weights; where decoding lays them out otherwise, they are moved."""
        sharding = model.embed.weight[...].sharding
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        if isinstance(mesh, Mesh) and mesh.size > 1:
            model = jax.device_put(model, tree_shardings(model, Layout(mesh, DECODE_RULES)))
        if self._engine is None:
            self._engine = Engine(model, self._settings, vocab_size=self._vocab_size)
        else:
            self._engine.take(model)
        return self._engine


class _Growing:
    """An answer on its way."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._last: Update | None = None

    def add(self, update: Update) -> None:
        self._tokens += update.tokens
        self._logprobs += update.drawn_logprobs
        self._last = update

    def finished(self, prompt: tuple[int, ...]) -> Written:
        last = self._last
        assert last is not None
        return Written(
            prompt,
            tuple(self._tokens),
            tuple(self._logprobs),
            truncated=last.finish == "length",
            experts=last.experts,
        )
