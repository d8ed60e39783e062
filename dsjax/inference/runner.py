"""What the engine has on the device, and how a planned step is run there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsjax.inference import sampler_state
from dsjax.inference.request import SamplingParams
from dsjax.inference.sampler_state import SamplerState, row_params
from dsjax.inference.scheduler import Chunk, Plan, Sequence, row_counts
from dsjax.inference.settings import PAGE_SIZE, READ_AT_ONCE, EngineSettings
from dsjax.inference.step import StepInputs, StepOutputs, step_for
from dsjax.model.decoder import Decoder, Pages, make_pages, take_apart
from dsjax.model.transformer import Transformer
from sharding.rules import DECODE_RULES, Layout, use_layout

MARKED_AT_ONCE = 512
"""Tokens of a prompt that the sampler is told of at once."""

T = TypeVar("T")

_ANYTHING = SamplingParams(max_tokens=1)


class Runner:
    """Weights, pages and the sampler's state, on a device or spread over a mesh.

    Over a mesh the batch goes over its batch axes: `groups` parts, each with `rows` rows and
    `pages` pages of its own.
    """

    def __init__(self, model: Transformer | Decoder, settings: EngineSettings, vocab_size: int):
        self.config = model.config
        self.drafts = settings.drafts if model.mtp is not None else 0
        self._layout = _layout_of(model)
        self.groups = 1 if self._layout is None else self._layout.ways("batch")
        self.rows = math.ceil(settings.rows / self.groups)
        self._table_width = math.ceil(settings.context / PAGE_SIZE)
        tokens = settings.cache_tokens or settings.rows * settings.context
        self.pages = max(self._table_width, tokens // PAGE_SIZE // self.groups)
        self.shapes = [
            (rows, queries)
            for queries in (32, 128, 512)
            for rows in (1, 4, 16)
            if rows <= self.rows and rows * queries <= READ_AT_ONCE
        ]
        self._vocab_size = np.int32(vocab_size)
        self._experts = settings.experts
        self.take(model)

        def empty() -> tuple[Pages, SamplerState]:
            pages = make_pages(
                self.config, self.groups, self.pages, PAGE_SIZE, model.dtype, mtp=self.drafts > 0
            )
            return pages, SamplerState.empty(self.groups * self.rows, self.config.vocab_size)

        with self._device():
            self._pages, self._sampler = self._spread(empty)

    def take(self, model: Transformer | Decoder) -> None:
        """Copy a model's weights, as decoding reads them; a decoder's own are used as they are."""
        with self._device():
            decoder = model if isinstance(model, Decoder) else take_apart(model)
            if not self.drafts:
                decoder = replace(decoder, mtp=None)
            self._weights, structure = jax.tree.flatten(decoder)
            self._step = step_for(structure)

    def run(self, plan: Plan) -> StepOutputs:
        """Run a step, and bring what it found to the host."""
        inputs = self._inputs(plan)
        with self._device():
            self._pages, self._sampler, found = self._step(
                self._weights,
                self._pages,
                self._sampler,
                inputs,
                self._vocab_size,
                samples=1 if plan.reading else plan.queries,
                drafts=self.drafts if plan.reading else plan.queries - 1,
            )
        # Log-probabilities are large and seldom wanted, and so is what else is left behind.
        wanted: dict[str, Any] = {
            "tokens": found.tokens,
            "valid": found.valid,
            "drafts": found.drafts,
        }
        if inputs.logprobs:
            wanted |= {"logprobs": found.logprobs, "drawn_logprobs": found.drawn_logprobs}
        if inputs.prompt_logprobs:
            wanted["prompt_logprobs"] = found.prompt_logprobs
        if self._experts:
            wanted["experts"] = found.experts
        return found._replace(**jax.device_get(wanted))

    def install(self, sequence: Sequence) -> None:
        """Tell the sampler who has this row now."""
        params, row = sequence.request.sampling, sequence.group * self.rows + sequence.row
        with self._device():
            arrays = row_params(params, self.config.eos_token_ids)
            self._sampler = _set_row(self._sampler, row, arrays)
            if params.repetition_penalty != 1:
                for begin in range(0, len(sequence.request.tokens), MARKED_AT_ONCE):
                    part = sequence.request.tokens[begin : begin + MARKED_AT_ONCE]
                    padded = np.zeros(MARKED_AT_ONCE, np.int32)
                    padded[: len(part)] = part
                    self._sampler = _mark_prompt(self._sampler, row, padded, len(part))
            if sequence.made:  # it was here before, and had to leave
                output = np.array(sequence.tokens[len(sequence.request.tokens) :])
                counts = np.bincount(output, minlength=self.config.vocab_size).astype(np.int32)
                self._sampler = _set_progress(self._sampler, row, sequence.made, counts)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile every program by running it on nothing."""
        nobody: list[list[Chunk]] = [[]] * self.groups
        plans = [Plan(rows, queries, True, nobody) for rows, queries in self.shapes]
        plans += [
            Plan(rows, 1 + drafts, False, nobody)
            for rows in row_counts(self.rows)
            for drafts in sorted({0, self.drafts})
        ]
        for done, plan in enumerate(plans):
            progress(done, len(plans))
            self.run(plan)
        with self._device():
            nothing, no_counts = (
                np.zeros(n, np.int32) for n in (MARKED_AT_ONCE, self.config.vocab_size)
            )
            self._sampler = _set_row(self._sampler, 0, row_params(_ANYTHING, ()))
            self._sampler = _mark_prompt(self._sampler, 0, nothing, 0)
            self._sampler = _set_progress(self._sampler, 0, 0, no_counts)
        progress(len(plans), len(plans))

    def _inputs(self, plan: Plan) -> StepInputs:
        """The arrays of a step."""
        batch = self.groups * plan.rows
        rows = np.full(batch, self.rows, np.int32)
        tokens, following = np.zeros((2, batch, plan.queries), np.int32)
        starts, counts, first = np.zeros((3, batch), np.int32)
        table = np.full((batch, self._table_width), self.pages, np.int32)
        samples = np.zeros(batch, bool)
        chances = prompt_chances = False
        for index, (sequence, count) in plan.placed():
            begin, known = sequence.filled, sequence.tokens
            read = known[begin : begin + count]
            read += sequence.drafts[: count - len(read)]
            rows[index], starts[index], counts[index] = sequence.row, begin, count
            tokens[index, :count] = read
            after = known[begin + 1 : begin + 1 + count]
            following[index, : len(after)] = after
            table[index, : len(sequence.pages)] = sequence.pages
            samples[index] = begin + count >= len(known)
            first[index] = count - 1 if plan.reading else 0
            params = sequence.request.sampling
            chances |= params.logprobs is not None
            prompt_chances |= plan.reading and sequence.wants_prompt_logprobs
        wanted: Any = np.bool_(chances), np.bool_(prompt_chances)
        arrays: list[Any] = [rows, tokens, following, starts, counts, table, samples, first]
        return StepInputs(*arrays, *wanted)

    def _spread(self, make: Callable[[], T]) -> T:
        """What `make` makes, over the mesh by first dimensions; no device has all of it."""
        layout = self._layout
        if layout is None:
            return make()

        return jax.jit(make, out_shardings=by_batch(layout, jax.eval_shape(make)))()

    @contextlib.contextmanager
    def _device(self) -> Iterator[None]:
        """Trace and run under the model's layout, if it has one."""
        with contextlib.ExitStack() as stack:
            if self._layout is not None:
                stack.enter_context(use_layout(self._layout))
            yield


_set_row = jax.jit(sampler_state.set_row, donate_argnums=0)
_mark_prompt = jax.jit(sampler_state.mark_prompt, donate_argnums=0)


@partial(jax.jit, donate_argnums=0)
def _set_progress(state: SamplerState, row: int, made: int, counts: np.ndarray) -> SamplerState:
    """A sequence that was here before goes on: what it has made so far."""
    return state._replace(
        made=state.made.at[row].set(made), counts=state.counts.at[row].set(counts)
    )


def by_batch(layout: Layout, shapes: Any) -> Any:
    """Where pages and the sampler's state lie on a mesh: first dimensions over its batch axes."""

    def place(array: jax.ShapeDtypeStruct) -> NamedSharding:
        return layout.sharding(("batch", *(None,) * (len(array.shape) - 1)), array.shape)

    return jax.tree.map(place, shapes)


def _layout_of(model: Transformer | Decoder) -> Layout | None:
    """The mesh that a model's weights are spread over; None on a single device."""
    sharding = model.embed.weight[...].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return Layout(mesh, DECODE_RULES) if isinstance(mesh, Mesh) and mesh.size > 1 else None
