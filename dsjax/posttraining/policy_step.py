"""One step of reinforcement learning, on the mesh of training and by hand as there.

The main model is trained; MTP modules, which only draft, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dsjax.config_grpo import GrpoRunConfig
from dsjax.model.layers import RouterBias, sum_of_copies, tree_places
from dsjax.model.mtp import shift
from dsjax.model.transformer import Transformer
from dsjax.posttraining.logprobs import TokenScores, token_scores
from dsjax.posttraining.objective import of_answers, policy_terms
from dsjax.posttraining.rows import Rows
from dsjax.training.optimizer import make_optimizer
from dsjax.training.step import TrainState, descend
from sharding.by_hand import (
    by_hand,
    copies,
    largest,
    sequence_part,
    summed_over_tokens,
    whole_sequence,
)
from sharding.rules import place


class PolicySums(NamedTuple):
    """What a step is recorded by; sums over trained tokens, but for the last two."""

    tokens: Float[Array, ""]
    objective: Float[Array, ""]
    """With its weights."""
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    clipped: Float[Array, ""]
    gap: Float[Array, ""]
    """|log pi - log pi_old|: in the first inner epoch the trainer beside the sampler."""
    load: Float[Array, "L E"]
    largest_gap: Float[Array, ""]


class PolicyMetrics(NamedTuple):
    """A step's sums, and whether it was taken."""

    sums: PolicySums
    grad_norm: Array
    finite: Array
    """False: loss or gradient was not finite, and the step changed nothing but the count."""


class PolicyKnobs(NamedTuple):
    """What changes from step to step: float32 scalars."""

    learning_rate: Array
    bias_update_rate: Array


def is_trained(path: tuple[Any, ...], variable: Any) -> bool:
    """A filter: parameters of the main model."""
    return isinstance(variable, nnx.Param) and path[0] != "mtp"


def is_steered(path: tuple[Any, ...], variable: Any) -> bool:
    """A filter: router biases of the main model."""
    return isinstance(variable, RouterBias) and path[0] != "mtp"


def init_policy(config: GrpoRunConfig, model: Transformer) -> TrainState:
    """A state that has taken no step; trace it, or jit it with output shardings."""
    _, params, _ = nnx.split(model, is_trained, ...)
    moments = make_optimizer(config.optimizer).init(params)
    key = jax.random.key_data(jax.random.key(config.seed))
    return TrainState(model, moments, jnp.zeros((), jnp.int32), key)


def score_rows(
    model: Transformer, rows: Rows, index: Array, config: GrpoRunConfig, vocab_size: int
) -> tuple[TokenScores, Array]:
    """Microbatch `index`: scores of every place's next token, and the experts' loads."""
    tokens, segments = rows.tokens[index], rows.segment_ids[index]
    experts = None if rows.experts is None else rows.experts[index].astype(jnp.int32)
    out = model(tokens, segment_ids=segments, experts=experts, remat=config.training.remat)
    head, chunk = model.head_weight(out.hidden.dtype), config.training.loss_chunk
    targets = sequence_part(shift(tokens, 1))
    scores = token_scores(out.hidden, head, targets, config.sampling, vocab_size, chunk)
    return scores, out.load


def make_scorer(
    config: GrpoRunConfig, vocab_size: int
) -> Callable[[Transformer, Rows, Array], Float[Array, "M B S"]]:
    """Log-probabilities of every place's next token, as `(model, rows, microbatches)`."""

    def scores(model: Transformer, rows: Rows, microbatches: Array) -> Array:
        graph, held = nnx.split(model)

        def of_parts(held: Any, rows: Rows, microbatches: Array) -> Array:
            model = nnx.merge(graph, held)

            def one(index: Array, found: Array) -> Array:
                logprobs = score_rows(model, rows, index, config, vocab_size)[0].logprobs
                return found.at[index].set(whole_sequence(logprobs))

            nothing = jnp.zeros(rows.tokens.shape, jnp.float32)
            return jax.lax.fori_loop(0, microbatches, one, nothing)

        spread, everywhere = _places(rows), PartitionSpec()
        run = by_hand(of_parts, (tree_places(held), spread, everywhere), spread.tokens)
        return run(held, rows, microbatches)

    return scores


def make_policy_step(
    config: GrpoRunConfig, vocab_size: int
) -> Callable[..., tuple[TrainState, PolicyMetrics]]:
    """The step as a pure function `(state, rows, reference, microbatches, knobs)`.

    `reference` [M, B, S] is log pi_ref of every place's next token. Weights are normalized by the
    whole step's counts, so what is computed depends neither on microbatches nor on packing.
    """
    optimizer = make_optimizer(config.optimizer)
    gradients = make_policy_gradients(config, vocab_size)

    def step(
        state: TrainState, rows: Rows, reference: Array, microbatches: Array, knobs: PolicyKnobs
    ) -> tuple[TrainState, PolicyMetrics]:
        grads, sums = gradients(state.model, rows, reference, microbatches)
        state, grad_norm, finite = descend(
            optimizer, state, (is_trained, is_steered), grads, sums.objective, sums.load,
            knobs.learning_rate, knobs.bias_update_rate,
        )  # fmt: skip
        return state, PolicyMetrics(sums, grad_norm, finite)

    return step


def make_policy_gradients(
    config: GrpoRunConfig, vocab_size: int
) -> Callable[[Transformer, Rows, Array, Array], tuple[Any, PolicySums]]:
    """Gradients of the loss, the objective's negative, as `(model, rows, reference, microbatches)`.

    Under a layout every device computes its share by hand, as in pre-training.
    """

    def gradients(
        model: Transformer, rows: Rows, reference: Array, microbatches: Array
    ) -> tuple[Any, PolicySums]:
        graph, params, fixed = nnx.split(model, is_trained, ...)

        def of_parts(
            params: Any, fixed: Any, rows: Rows, reference: Array, microbatches: Array
        ) -> tuple[Any, PolicySums]:
            def of_microbatch(index: Array) -> tuple[Any, PolicySums]:
                def share(params: Any) -> tuple[Array, PolicySums]:
                    model = nnx.merge(graph, params, fixed)
                    scores, load = score_rows(model, rows, index, config, vocab_size)
                    at = jax.tree.map(lambda x: x[index], rows._replace(experts=None))
                    total, sums = _loss(scores, load, at, reference[index], config)
                    return total / copies(), sums

                grads, sums = jax.grad(share, has_aux=True)(params)
                return optax.tree.cast(grads, jnp.float32), sums

            def add(index: Array, total: Any) -> Any:
                grads, sums = of_microbatch(index)
                most = jnp.maximum(total[1].largest_gap, sums.largest_gap)
                total = jax.tree.map(jnp.add, total, (grads, sums))
                return total[0], total[1]._replace(largest_gap=most)

            shapes = jax.eval_shape(of_microbatch, jnp.zeros((), jnp.int32))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            grads, sums = jax.lax.fori_loop(0, microbatches, add, zeros)
            return sum_of_copies(grads), _over_devices(sums)

        places, spread, everywhere = tree_places(params), _places(rows), PartitionSpec()
        taken = places, tree_places(fixed), spread, spread.tokens, everywhere
        run = by_hand(of_parts, taken, (places, everywhere))
        return run(params, fixed, rows, reference, microbatches)

    return gradients


def _loss(
    scores: TokenScores, load: Array, rows: Rows, reference: Array, config: GrpoRunConfig
) -> tuple[Array, PolicySums]:
    """A microbatch's share of the step's loss; by hand, this device's share of that."""
    trained = sequence_part(rows.trained)
    weights, advantages, old = (sequence_part(x) for x in (rows.weights, rows.advantages, rows.old))
    reference = sequence_part(reference)
    logprobs = jnp.where(trained, scores.logprobs, 0)
    old, reference = (jnp.where(trained, x, 0) for x in (old, reference))
    gap = jnp.abs(jax.lax.stop_gradient(logprobs) - old)
    if config.grpo.objective == "r1":
        most = rows.segment_ids.shape[1]
        logprobs, old, reference = (
            of_answers(x, rows.segment_ids, most) for x in (logprobs, old, reference)
        )
    terms = policy_terms(logprobs, old, reference, advantages, config.grpo)
    objective = (weights * terms.objective).sum()

    def total(x: Array) -> Array:
        return jnp.where(trained, jax.lax.stop_gradient(x), 0).sum()

    sums = PolicySums(
        tokens=trained.sum().astype(jnp.float32),
        objective=jax.lax.stop_gradient(objective),
        kl=total(terms.kl),
        entropy=total(scores.entropy),
        clipped=total(terms.clipped.astype(jnp.float32)),
        gap=total(gap),
        load=load,
        largest_gap=gap.max(),
    )
    return -objective, sums


def _over_devices(sums: PolicySums) -> PolicySums:
    """Of all tokens, wherever they are."""
    most = largest(sums.largest_gap, "batch", "sequence")
    return jax.tree.map(summed_over_tokens, sums)._replace(largest_gap=most)


def _places(rows: Rows) -> Rows:
    """Where each array of the rows lies: split by rows, sequences whole."""
    return jax.tree.map(lambda x: place(x.shape, None, "batch", *(None,) * (x.ndim - 2)), rows)
