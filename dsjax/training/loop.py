"""The training loop: batches in, steps, records, evaluations and saves out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import stages
from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore
from dsjax.config import TrainRunConfig, schedule_value
from dsjax.data.batches import Batches, joined_state
from dsjax.data.held_out import HeldOutRows
from dsjax.training.bucket_metrics import BucketMetrics
from dsjax.training.divergence import BadSteps
from dsjax.training.evaluate import add_scores, batches_of, score_rows, summarize
from dsjax.training.metrics import MetricsLog
from dsjax.training.optimizer import learning_rate_at
from dsjax.training.profile import StepProfiler
from dsjax.training.progress import ProgressDisplay
from dsjax.training.signals import Stopped, Termination, leave_soon
from dsjax.training.step import Batch, Knobs, Metrics, TrainState, kept, make_train_step
from dsjax.training.throughput import Throughput
from sharding.distributed import (
    WORK_SECONDS,
    MissingProcessError,
    barrier,
    fetch,
    gather,
    is_alone,
    place_rows,
)
from sharding.rules import Layout

StepMaker = Callable[[Any], Callable[..., tuple[TrainState, Metrics]]]
"""What makes a run's step of its configuration, as `make_train_step` does."""


@dataclass
class Clock:
    """Where a run is. Tokens are counted here: 14.8T do not fit into a device's int32."""

    step: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """What the schedules say about one step."""

    microbatches: int
    tokens: int
    learning_rate: float
    mtp_weight: float
    bias_update_rate: float


def plan_step(config: TrainRunConfig, clock: Clock) -> Plan:
    """Read every schedule at the tokens seen before the step."""
    training = config.training
    seen = clock.tokens
    rows = schedule_value(training.batch_size, seen)
    microbatches = int(rows) // training.microbatch_size
    return Plan(
        microbatches=microbatches,
        tokens=microbatches * training.microbatch_size * config.data.sequence_length,
        learning_rate=learning_rate_at(config.optimizer, clock.step, seen),
        mtp_weight=schedule_value(training.mtp_weight, seen),
        bias_update_rate=schedule_value(training.bias_update_rate, seen),
    )


@dataclass
class TrainingLoop:
    """One run while it runs. `exit_code` is set when it ends before its tokens are seen."""

    config: TrainRunConfig
    tokens: int
    """How many it sees, padding included."""
    layout: Layout
    state: TrainState
    clock: Clock
    data: Batches
    rows: np.ndarray
    """Which rows of every microbatch `data` gives."""
    held_out: HeldOutRows | None
    store: CheckpointStore
    log: MetricsLog | BucketMetrics
    profiler: StepProfiler
    console: Console
    termination: Termination
    make_step: StepMaker = make_train_step
    beside: tuple[Any, ...] = ()
    """What the step takes beside the state."""
    exit_code: int | None = None

    def __post_init__(self) -> None:
        self._step: Any = jax.jit(self.make_step(self.config), donate_argnums=0)
        self._score: Any = jax.jit(partial(score_rows, chunk=self.config.training.loss_chunk))
        most = max(stage.value for stage in self.config.training.batch_size)
        self._slots = int(most) // self.config.training.microbatch_size
        self._saved_at = self.clock.step
        self._display = ProgressDisplay(self.tokens, self.clock.tokens, self.console)
        self._bad_steps = BadSteps(self.config.training.max_bad_steps, self._display)
        self._before_reading: dict[str, Any] | None = None
        """The state of `data` before a step of which not all data came."""

    def run(self) -> None:
        """Step until the tokens are seen, a signal arrives, or the run has diverged.

        Raises:
            MissingProcessError: a signal came while this process, one of several, waited for data:
                the others are in a step that it does not join.
        """
        if not self._done():
            self._train()
        if self._before_reading is not None and not is_alone():
            leave_soon(1)
            raise MissingProcessError("stopped by a signal while it waited for data")
        self.termination.settle()
        if self.exit_code is None:
            self.exit_code = self.termination.exit_code
        self.save()
        self.store.wait()
        if self._before_reading is not None and self.exit_code is not None:
            leave_soon(self.exit_code)  # what reads ahead may never end

    def _train(self) -> None:
        with self._display:
            self._compile()
            pending: tuple[Clock, Plan, Metrics] | None = None
            self._throughput = Throughput()
            while not self._done():
                plan = plan_step(self.config, self.clock)
                try:
                    arguments = self._arguments(plan)
                except Stopped:
                    self._display.say("stopped while waiting for data")
                    break
                with self.profiler.step(self.clock.step + 1, self.state):
                    self.state, metrics = self._step(*arguments)
                self.clock = Clock(self.clock.step + 1, self.clock.tokens + plan.tokens)
                # The last step's numbers are fetched while this one runs.
                if pending:
                    self._report(*pending)
                pending = (self.clock, plan, metrics)
                if self._due(self.config.evaluation.every_steps) or self._due(
                    self.config.checkpoint.every_steps
                ):
                    self._report(*pending)
                    pending = None
                    self._throughput.pause()
                    self._pause()
                    self._throughput.resume()
            if pending:
                self._report(*pending)

    def evaluate(self, limit: int | None) -> None:
        """Score held-out rows, all or the first `limit` batches, and record the result."""
        assert self.held_out is not None
        total = None
        size = self.config.training.microbatch_size
        for arrays in batches_of(self.held_out, size, limit):
            placed = [self._place(array, np.arange(size), "batch", None) for array in arrays]
            if isinstance(self._score, stages.Wrapped):
                self._score = self._score.lower(self.state.model, *placed).compile()
                self._meet()
            total = add_scores(total, fetch(self._score(self.state.model, *placed)))
        assert total is not None
        found = summarize(total, self.held_out)
        values = {f"held_out_{name}": value for name, value in found._asdict().items()}
        complete = limit is None
        self.log.write(
            self.clock.step, {"tokens": self.clock.tokens, "held_out_complete": complete, **values}
        )
        said = [
            f"step {self.clock.step}  held out{'' if complete else ' (sample)'}: "
            f"loss {found.loss:.3f}",
            f"{found.bits_per_byte:.3f} bits per byte",
        ]
        if found.max_violation:
            said.append(f"MaxVio {max(found.max_violation):.2f}")
        if math.isfinite(found.acceptance):
            said.append(f"MTP acceptance {found.acceptance:.0%}")
        self._display.say("  ".join(said))

    def save(self) -> None:
        """Start saving everything that the next step depends on."""
        if self._saved_at == self.clock.step:
            return
        read = self._before_reading or self.data.get_state()
        extra = {
            "tokens": self.clock.tokens,
            "data": joined_state(gather("data", read, first_only=True)),
            "model": self.config.model.model_dump(),
        }
        self.log.cut()
        self.store.save(self.clock.step, kept(self.state), extra)
        self._saved_at = self.clock.step

    def _done(self) -> bool:
        training = self.config.training
        return (
            self.clock.tokens >= self.tokens
            or (training.max_steps is not None and self.clock.step >= training.max_steps)
            or self.exit_code is not None
            or self.termination.reached(self.clock.step)
        )

    def _due(self, every: int) -> bool:
        return self.clock.step % every == 0

    def _pause(self) -> None:
        """Between two steps: evaluate and save what is due; the save covers the record."""
        if self.held_out is not None and self._due(self.config.evaluation.every_steps):
            self.evaluate(self.config.evaluation.batches)
        if self._due(self.config.checkpoint.every_steps):
            self.save()

    def _compile(self) -> None:
        """Compile before the clock of throughput starts."""
        begin = time.monotonic()
        plan = Plan(1, 0, 0.0, 0.0, 0.0)
        empty = self._placed_batch(self._empty_batch())
        self._step = self._step.lower(self.state, empty, *_scalars(plan), *self.beside).compile()
        self._meet()
        self._display.say(f"compiled the step in {time.monotonic() - begin:.1f} s")

    def _arguments(self, plan: Plan) -> tuple[Any, ...]:
        arrays = self._empty_batch()
        self._before_reading = self.data.get_state()
        for index in range(plan.microbatches):
            with self.termination.interruptible():
                microbatch = next(self.data)
            for name, array in arrays.items():
                array[index] = microbatch[name]
        self._before_reading = None
        return self.state, self._placed_batch(arrays), *_scalars(plan), *self.beside

    def _empty_batch(self) -> dict[str, np.ndarray]:
        """Of what `Batch` has, as much as the data give."""
        shape = self._batch_shape()
        return {name: np.zeros(shape, dtype) for name, dtype in self.data.fields.items()}

    def _placed_batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        return Batch(**{name: self._place_batch(array) for name, array in arrays.items()})

    def _meet(self) -> None:
        """After compiling: processes on CPUs give one another 30 s to join in a collective."""
        barrier("compiled", WORK_SECONDS)

    def _batch_shape(self) -> tuple[int, int, int]:
        """Microbatches, this process's rows of each, and places."""
        return self._slots, len(self.rows), self.config.data.sequence_length

    def _place_batch(self, array: np.ndarray) -> jax.Array:
        return self._place(array, self.rows, None, "batch", None)

    def _place(self, array: np.ndarray, rows: np.ndarray, *axes: str | None) -> jax.Array:
        """Some rows of a microbatch as their part of the global array on the mesh."""
        axis = axes.index("batch")
        shape = list(array.shape)
        shape[axis] = self.config.training.microbatch_size
        sharding = self.layout.sharding(axes, tuple(shape))
        return place_rows(sharding, tuple(shape), axis, rows, array)

    def _report(self, clock: Clock, plan: Plan, metrics: Metrics) -> None:
        """Record a finished step."""
        metrics = fetch(metrics)
        tokens_per_second = self._throughput.add(plan.tokens)
        sums, finite = metrics.sums, bool(metrics.finite)
        violations = metrics.max_violation.tolist()
        values = {
            "tokens": clock.tokens,
            "loss": float(sums.loss),
            "mtp_loss": sums.mtp_loss.tolist(),
            "balance_loss": float(sums.balance_loss),
            "max_violation": violations,
            "load": sums.load.tolist(),
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": plan.learning_rate,
            "mtp_weight": plan.mtp_weight,
            "bias_update_rate": plan.bias_update_rate,
            "batch_size": plan.microbatches * self.config.training.microbatch_size,
            "tokens_per_second": tokens_per_second,
            "finite": finite,
        }
        if violations:  # a dense model has no experts
            values["max_violation_worst"] = max(violations)
        self.log.write(clock.step, values)
        self._display.update(clock.step, clock.tokens, values)
        if self._bad_steps.has_diverged(clock.step, finite):
            self.exit_code = 1


def _scalars(plan: Plan) -> tuple[jax.Array, Knobs]:
    knobs = (plan.learning_rate, plan.mtp_weight, plan.bias_update_rate)
    return jnp.int32(plan.microbatches), Knobs(*(jnp.float32(value) for value in knobs))
