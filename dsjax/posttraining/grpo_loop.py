"""Reinforcement learning while it runs: questions, answers, rewards, steps, records and saves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import stages
from rich.console import Console

from dsjax.checkpoint.store import CheckpointStore
from dsjax.config_grpo import GrpoRunConfig
from dsjax.data.language import Language
from dsjax.model.transformer import Transformer
from dsjax.posttraining.advantages import token_weights
from dsjax.posttraining.policy_step import (
    PolicyKnobs,
    PolicyMetrics,
    make_policy_step,
    make_scorer,
)
from dsjax.posttraining.prompts import Questions
from dsjax.posttraining.rollout_rewards import (
    Rollout,
    best_constant,
    describe,
    is_solved,
    score_groups,
    weigh,
)
from dsjax.posttraining.rollouts import Sampler
from dsjax.posttraining.rows import Rows, pack
from dsjax.rewards.failures import count_failures, describe_failures, refuse_total_failure
from dsjax.rewards.score import Scorer
from dsjax.training.bucket_metrics import BucketMetrics
from dsjax.training.divergence import BadSteps
from dsjax.training.metrics import MetricsLog
from dsjax.training.optimizer import learning_rate_at
from dsjax.training.progress import Display
from dsjax.training.signals import Stopped, Termination, leave_soon
from dsjax.training.step import TrainState, max_violation
from sharding.distributed import WORK_SECONDS, barrier, fetch, is_alone
from sharding.rules import Layout, use_layout

ACTIVITIES = ("sampling", "scoring", "training")
"""What time is spent on."""
_TRAINING, _EVALUATION = 0, 1
"""What a seed is for."""


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    rollout: int = 0
    place: int = 0
    """In the order of the questions."""
    tokens: int = 0
    """Of answers that were trained on, once in every inner epoch."""


@dataclass
class GrpoLoop:
    """One run. `exit_code` is set when it ends before its last step."""

    config: GrpoRunConfig
    layout: Layout
    state: TrainState
    reference: Transformer | None
    progress: Progress
    language: Language
    stop_tokens: tuple[int, ...]
    questions: Questions
    scorer: Scorer
    store: CheckpointStore
    log: MetricsLog | BucketMetrics
    console: Console
    termination: Termination
    exit_code: int | None = None

    def __post_init__(self) -> None:
        config, vocab_size = self.config, self.language.tokenizer.vocab_size
        self._step: Any = jax.jit(make_policy_step(config, vocab_size), donate_argnums=0)
        self._score: Any = jax.jit(make_scorer(config, vocab_size))
        grpo, training = config.grpo, config.training
        self._sampler = Sampler(
            config.sampling, training.sequence_length, vocab_size, self.stop_tokens,
            experts=grpo.router_replay,
        )  # fmt: skip
        answers = grpo.prompts_per_step * grpo.group_size
        self._slots = -(-answers // training.microbatch_size)
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._saved_at = self.progress.step
        self._display = Display(training.max_steps, self.progress.step, self.console)
        self._bad_steps = BadSteps(training.max_bad_steps, self._display)
        asked = 0 if config.evaluation is None else config.evaluation.prompts
        self._held_out = self.questions.held_out(asked)
        self._stop_asked = 0
        self._is_scored = False
        """Whether some answers of this process have been scored."""
        self._stopped_scoring = False

    def run(self) -> None:
        """Rollout after rollout until all steps are taken, a signal arrives, or it has diverged."""
        with self._display:
            if self.progress.step == 0 and not self.log.is_evaluated:
                self._evaluate_if_due()
            while not self._done():
                rollout = self._roll_out()
                if rollout is None:
                    break
                with use_layout(self.layout):
                    self._train_on(rollout)
                self._evaluate_if_due()
                if self._passed(self.config.checkpoint.every_steps):
                    self.save()
        self.termination.settle()
        if self.exit_code is None:
            self.exit_code = self.termination.exit_code
        self.save()
        self.store.wait()
        if self._stopped_scoring and self.exit_code is not None:
            leave_soon(self.exit_code)  # a verifier may never end

    def save(self) -> None:
        """Start saving everything that the next rollout depends on."""
        if self._saved_at == self.progress.step:
            return
        state = self.state._asdict() | {"reference": self.reference}
        self.log.cut()
        self.store.save(self.progress.step, state, {"progress": asdict(self.progress)})
        self._saved_at = self.progress.step

    def _done(self) -> bool:
        return (
            self.progress.step >= self.config.training.max_steps
            or self.exit_code is not None
            or self._is_asked_to_stop()
        )

    def _passed(self, every: int) -> bool:
        """Whether a multiple of `every` lies within the rollout that has just been trained on."""
        grpo = self.config.grpo
        taken = grpo.steps_per_rollout * grpo.inner_epochs
        return self.progress.step // every > (self.progress.step - taken) // every

    def _is_asked_to_stop(self) -> bool:
        """Whether all processes stop here: each asks in the same places, which are counted.

        Of any two questions one is followed by a step of the engine or of training, in which all
        processes meet.
        """
        self._stop_asked += 1
        return self.termination.reached(self._stop_asked)

    # What is drawn -----------------------------------------------------------------------------

    def _roll_out(self) -> Rollout | None:
        """Answers to the next questions, and what they are worth; None when asked to stop.

        Groups without an advantage give way to others, as often as `refills` says.
        """
        grpo, progress = self.config.grpo, self.progress
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        missing = grpo.prompts_per_step * grpo.steps_per_rollout
        place, kept = progress.place, None
        for turn in range(grpo.refills + 1):
            records, place = self.questions.training(place, missing)
            seed = [self.config.seed, _TRAINING, progress.rollout, turn]
            drawn = self._draw(records, grpo.group_size, seed)
            if drawn is None:
                return None
            found = weigh(*drawn, self.config, seed)
            kept = found if kept is None else kept.refilled(found)
            missing = int(kept.equal.sum())
            if missing == 0:
                break
        progress.place, progress.rollout = place, progress.rollout + 1
        return kept

    def _draw(
        self, records: Sequence[Mapping[str, Any]], count: int, seed: Sequence[int]
    ) -> tuple[list[list[Any]], list[list[Any]]] | None:
        """`count` answers to each question, and their scores."""
        prompts = [self.questions.encode(record, self.language) for record in records]
        begin = time.monotonic()
        written = self._sampler.draw(self.state.model, prompts, count, seed, self._is_asked_to_stop)
        if written is None:
            return None
        drawn = time.monotonic()
        try:
            # Of several processes the others wait for this one's scores, and leave with it.
            with self.termination.interruptible() if is_alone() else nullcontext():
                scores = score_groups(written, records, self.language, self.scorer)
        except Stopped:
            self._stopped_scoring = True
            return None
        if not self._is_scored:
            refuse_total_failure(list(chain(*scores)), "the first rollout")
            self._is_scored = True
        self._seconds["sampling"] += drawn - begin
        self._seconds["scoring"] += time.monotonic() - drawn
        return written, scores

    # What is learned ---------------------------------------------------------------------------

    def _train_on(self, rollout: Rollout) -> None:
        """Every step of every inner epoch. The ratio is computed anew in each of them."""
        grpo = self.config.grpo
        size = grpo.prompts_per_step
        parts = [rollout.part(n * size, (n + 1) * size) for n in range(grpo.steps_per_rollout)]
        packed = [self._pack(part) for part in parts]
        begin = time.monotonic()
        self._compile(*packed[0])
        reference = [self._reference_of(*rows) for rows in packed]
        for epoch in range(grpo.inner_epochs):
            for part, (rows, count), known in zip(parts, packed, reference, strict=True):
                knobs = self._knobs()
                self.state, metrics = self._step(self.state, rows, known, count, knobs)
                metrics = fetch(metrics)
                self._seconds["training"] += time.monotonic() - begin
                self._after(part, metrics, epoch, float(knobs.learning_rate))
                begin = time.monotonic()

    def _compile(self, rows: Rows, count: Any) -> None:
        """Once; processes on CPUs give one another 30 s to join in a collective."""
        if not isinstance(self._step, stages.Wrapped):
            return
        if self.reference is not None:
            self._score = self._score.lower(self.reference, rows, count).compile()
        arguments = self.state, rows, rows.old, count, self._knobs()
        self._step = self._step.lower(*arguments).compile()
        barrier("compiled", WORK_SECONDS)

    def _pack(self, part: Rollout) -> tuple[Rows, Any]:
        """Rows on the mesh, and how many microbatches of them there are."""
        config = self.config
        written = [one for group in part.written for one in group]
        cut = np.array([one.truncated for one in written])
        trained = ~cut if config.grpo.truncated == "not_trained" else np.ones(len(cut), bool)
        if config.grpo.kl_weight == 0:  # no advantage is no gradient
            trained &= ~np.repeat(part.equal, config.grpo.group_size)
        lengths = np.array([len(one.tokens) for one in written])
        weights = token_weights(lengths, trained, config.grpo, config.sampling.max_tokens)
        rows, count = pack(
            written,
            part.advantages.ravel(),
            weights,
            microbatch_size=config.training.microbatch_size,
            sequence_length=config.training.sequence_length,
            slots=self._slots,
            replay=config.grpo.router_replay,
        )

        def put(x: np.ndarray) -> jax.Array:
            axes = (None, "batch", *(None,) * (x.ndim - 2))
            sharding = self.layout.sharding(axes, x.shape)
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

        return jax.tree.map(put, rows), jnp.int32(count)

    def _reference_of(self, rows: Rows, count: Any) -> jax.Array:
        if self.reference is None:
            return jnp.zeros_like(rows.old)
        return self._score(self.reference, rows, count)

    def _knobs(self) -> PolicyKnobs:
        progress = self.progress
        rate = learning_rate_at(self.config.optimizer, progress.step, progress.tokens)
        return PolicyKnobs(jnp.float32(rate), jnp.float32(self.config.grpo.bias_update_rate))

    def _after(self, part: Rollout, metrics: PolicyMetrics, epoch: int, rate: float) -> None:
        """Record a finished step, and replace the reference where it is due."""
        progress, grpo = self.progress, self.config.grpo
        progress.step += 1
        progress.tokens += int(metrics.sums.tokens)
        values = {
            "tokens": progress.tokens,
            "rollout": progress.rollout,
            "inner_epoch": epoch,
            **describe(part),
            **_figures(metrics, first=epoch == 0),
            "learning_rate": rate,
            **{f"{name}_seconds": seconds for name, seconds in self._seconds.items()},
        }
        self.log.write(progress.step, values)
        self._show(values, describe_failures(list(chain(*part.scores))))
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        every = grpo.reference_every
        if self.reference is not None and every and progress.step % every == 0:
            self.reference = jax.tree.map(jnp.copy, self.state.model)
        if self._bad_steps.has_diverged(progress.step, bool(metrics.finite)):
            self.exit_code = 1

    def _show(self, values: Mapping[str, Any], failures: str) -> None:
        self._display.show(
            self.progress.step,
            f"step {self.progress.step}  reward {values['reward']:.3f}  "
            f"solved {values['solved']:.1%}  {values['answer_tokens']:.0f} tokens an answer",
            failures,
        )

    # What has been learned ---------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        settings, step = self.config.evaluation, self.progress.step
        ends = step in (0, self.config.training.max_steps)
        if settings is None or not (ends or self._passed(settings.every_steps)):
            return
        drawn = self._draw(self._held_out, settings.samples, [self.config.seed, _EVALUATION])
        if drawn is None:
            return
        solved = is_solved(drawn[1])
        values: dict[str, Any] = {"held_out_pass_at_1": float(solved.mean())}
        if settings.samples > 1:
            values[f"held_out_pass_at_{settings.samples}"] = float(solved.any(1).mean())
        if (constant := best_constant(self._held_out)) is not None:
            values["held_out_best_constant"] = constant
        told = {"tokens": self.progress.tokens, "held_out_complete": True, **values}
        scores = list(chain(*drawn[1]))
        failed = {f"held_out_failed {k}": count for k, count in count_failures(scores).items()}
        self.log.write(step, told | failed)
        said = "  ".join(f"{name.removeprefix('held_out_')} {v:.1%}" for name, v in values.items())
        failures = f"  ({described})" if (described := describe_failures(scores)) else ""
        self._display.say(f"step {step}  held out: {said.replace('_', ' ')}{failures}")


def _figures(metrics: PolicyMetrics, *, first: bool) -> dict[str, Any]:
    """A step's sums as means over its trained tokens."""
    sums = metrics.sums
    tokens = max(float(sums.tokens), 1.0)
    figures = {
        "objective": float(sums.objective),
        "kl": float(sums.kl) / tokens,
        "entropy": float(sums.entropy) / tokens,
        "clipped": float(sums.clipped) / tokens,
        "grad_norm": float(metrics.grad_norm),
        "finite": bool(metrics.finite),
    }
    if first:  # later the policy has moved on from the one that was sampled
        figures["sampler_gap"] = float(sums.gap) / tokens
        figures["sampler_gap_largest"] = float(sums.largest_gap)
    if sums.load.size:
        figures["max_violation_worst"] = float(np.max(max_violation(sums.load)))
    return figures
