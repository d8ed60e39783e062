"""One training step: gradients over microbatches, AdamW, and the routers' biases.

Losses of DeepSeek-V3 (arXiv:2412.19437):

    L = L_main + lambda / D * sum_k L_MTP^k  (section 2.2)  + alpha * sum_layers L_Bal  (2.1.2)

Every mean is taken over the counts of the whole batch, so that the result does not depend on how
the batch is cut into microbatches or spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import TrainRunConfig
from dsjax.model.layers import Frozen, RouterBias, sum_of_copies, tree_places, variables
from dsjax.model.mtp import reaches, shift
from dsjax.model.transformer import Remat, Transformer
from dsjax.training.loss import cross_entropy
from dsjax.training.optimizer import make_optimizer
from sharding.by_hand import by_hand, copies, sequence_part, summed, summed_over_tokens
from sharding.rules import place


class TrainState(NamedTuple):
    """Everything a step reads and writes. Tokens seen are counted by the host (past 2^31)."""

    model: Any
    """A Transformer; in `kept`, the state of what it trains."""
    moments: Any
    step: Int[Array, ""]
    key: Array
    """Root of all randomness that is not the data's, as raw key data."""


class Batch(NamedTuple):
    """Microbatches of packed rows. Segment 0 is padding; whole rows of it are allowed."""

    tokens: Int[Array, "M B S"]
    segment_ids: Int[Array, "M B S"]
    trained: Bool[Array, "M B S"] | None = None
    """Which tokens are targets, by their positions and never by what they are; None for all."""


class Knobs(NamedTuple):
    """The scheduled scalars of this step."""

    learning_rate: Float[Array, ""]
    mtp_weight: Float[Array, ""]
    """lambda"""
    bias_update_rate: Float[Array, ""]
    """gamma"""


class Sums(NamedTuple):
    """What microbatches add up to."""

    loss: Float[Array, ""]
    """Mean next-token loss, nats."""
    mtp_loss: Float[Array, "K"]
    """Mean loss of each MTP depth, nats."""
    balance_loss: Float[Array, ""]
    load: Float[Array, "L E"]
    """Pairs each expert received, main layers then MTP layers."""


class Metrics(NamedTuple):
    """What a step reports."""

    sums: Sums
    grad_norm: Float[Array, ""]
    max_violation: Float[Array, "L"]
    """max load / mean load - 1 of each expert layer (arXiv:2408.15664, MaxVio)."""
    finite: Array
    """False: loss or gradient was not finite, and the step changed nothing but the count."""


def max_violation(load: Float[Array, "L E"]) -> Float[Array, "L"]:
    """MaxVio: how far the busiest expert is above the mean load."""
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return load.max(-1, initial=0.0) / mean - 1  # initial: a dense model has no experts


def batch_loss(
    model: Transformer,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    counts: Int[Array, "K1"],
    rows: Array,
    mtp_weight: Array,
    trained: Bool[Array, "B S"] | None = None,
    *,
    balance_weight: float,
    loss_chunk: int,
    remat: Remat,
    main: Callable[..., Any] = cross_entropy,
) -> tuple[Float[Array, ""], Sums]:
    """A microbatch's share of the batch's loss; by hand, this device's share of that.

    Args:
        counts: targets in the whole batch: next token, then each MTP depth.
        rows: rows of the whole batch that hold any token.
        trained: which tokens are targets; None for all.
        main: the loss of the main model's places, of cross-entropy's arguments.
    """
    out = model(tokens, segment_ids=segment_ids, remat=remat)
    ahead = model.look_ahead(out, remat=remat)
    head = model.head_weight(out.hidden.dtype)
    losses = []
    for by, hidden in enumerate((out.hidden, *ahead.hidden), start=1):
        counted = sequence_part(has_target(segment_ids, trained, by))
        weights = counted / jnp.maximum(counts[by - 1], 1)
        targets = sequence_part(shift(tokens, by))
        of_places = main if by == 1 else cross_entropy
        losses.append(of_places(hidden, head, targets, weights, loss_chunk))
    mtp = jnp.stack(losses[1:]) if losses[1:] else jnp.zeros(0)
    balance = (out.balance_loss.sum() + ahead.balance_loss.sum()) / rows
    total = losses[0] + balance_weight * balance
    if losses[1:]:
        total += mtp_weight * mtp.mean()
    load = jnp.concatenate([out.load, ahead.load])
    return total, Sums(losses[0], mtp, balance, load)


def has_target(
    segment_ids: Int[Array, "B S"], trained: Bool[Array, "B S"] | None, by: int
) -> Bool[Array, "B S"]:
    """Which positions have a target `by` places on: in their document, and one that is trained."""
    there = reaches(segment_ids, by)
    return there if trained is None else there & shift(trained, by)


def target_counts(
    segment_ids: Int[Array, "M B S"], depths: int, trained: Bool[Array, "M B S"] | None = None
) -> Int[Array, "K1"]:
    """How many positions have a target 1, 2, ... depths + 1 places on."""
    length = segment_ids.shape[-1]
    rows = segment_ids.reshape(-1, length)
    marks = None if trained is None else trained.reshape(-1, length)
    return jnp.stack([has_target(rows, marks, by).sum() for by in range(1, depths + 2)])


def make_gradients(
    config: TrainRunConfig, loss: Callable[..., tuple[Array, Sums]] = batch_loss
) -> Callable[..., tuple[Any, Sums]]:
    """The gradients of a batch's loss, as `(model, batch, microbatches, mtp_weight, *beside)`.

    Under a layout every device computes its share by hand (`sharding.by_hand`): gradients come out
    split as the parameters are, and whole in the sense that all tokens are in them. What has no
    gradient, biases and frozen weights, comes along.

    Args:
        loss: `batch_loss`, or what takes, after its positional arguments, `beside`: models whose
            weights are constants.
    """
    training = config.training
    share = partial(
        loss,
        balance_weight=training.balance_loss_weight,
        loss_chunk=training.loss_chunk,
        remat=training.remat,
    )

    def gradients(
        model: Transformer, batch: Batch, microbatches: Array, mtp_weight: Array, *beside: Any
    ) -> tuple[Any, Sums]:
        graph, params, others = nnx.split(model, nnx.Param, ...)
        depths = config.model.num_nextn_predict_layers
        of_parts = partial(_gradients_of_parts, graph, share, depths)
        rows = jax.tree.map(lambda x: place(x.shape, None, "batch", None), batch)
        everywhere = PartitionSpec()
        own = tree_places(params)
        places = own, tree_places(others), rows, everywhere, everywhere, *map(tree_places, beside)
        run = by_hand(of_parts, places, (own, everywhere))
        return run(params, others, batch, microbatches, mtp_weight, *beside)

    return gradients


def _gradients_of_parts(
    graph: Any,
    loss: Callable[..., tuple[Array, Sums]],
    depths: int,
    params: Any,
    others: Any,
    batch: Batch,
    microbatches: Array,
    mtp_weight: Array,
    *beside: Any,
) -> tuple[Any, Sums]:
    """What one device computes: of its rows and its parts of the weights."""
    live = jnp.arange(batch.tokens.shape[0])[:, None, None] < microbatches
    segments = jnp.where(live, batch.segment_ids, 0)
    counts = summed(target_counts(segments, depths, batch.trained), "batch")
    rows = jnp.maximum(summed((segments > 0).any(-1).sum(), "batch"), 1)

    def of_microbatch(index: Array) -> tuple[Any, Sums]:
        def share(params: Any) -> tuple[Array, Sums]:
            model = nnx.merge(graph, params, others)
            tokens, ids = batch.tokens[index], segments[index]
            trained = None if batch.trained is None else batch.trained[index]
            total, sums = loss(model, tokens, ids, counts, rows, mtp_weight, trained, *beside)
            return total / copies(), sums

        grads, sums = jax.grad(share, has_aux=True)(params)
        return optax.tree.cast(grads, jnp.float32), sums

    grads, sums = _accumulate(of_microbatch, batch.tokens.shape[0], microbatches)
    return sum_of_copies(grads), jax.tree.map(summed_over_tokens, sums)


def make_train_step(
    config: TrainRunConfig, loss: Callable[..., tuple[Array, Sums]] = batch_loss
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The step as a pure function `(state, batch, microbatches, knobs, *beside)`, for `jax.jit`.

    Only the first `microbatches` of the batch are used: the batch can grow during a run without
    compiling again. `make_gradients` says what `loss` and `beside` may be.
    """
    optimizer = make_optimizer(config.optimizer)
    gradients = make_gradients(config, loss)

    def step(
        state: TrainState, batch: Batch, microbatches: Array, knobs: Knobs, *beside: Any
    ) -> tuple[TrainState, Metrics]:
        grads, sums = gradients(state.model, batch, microbatches, knobs.mtp_weight, *beside)
        state, grad_norm, finite = descend(
            optimizer, state, (nnx.Param, RouterBias), grads, sums.loss, sums.load,
            knobs.learning_rate, knobs.bias_update_rate,
        )  # fmt: skip
        return state, Metrics(sums, grad_norm, max_violation(sums.load), finite)

    return step


def descend(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    moving: tuple[Any, Any],
    grads: Any,
    loss: Array,
    load: Float[Array, "L E"],
    learning_rate: Array,
    bias_update_rate: Array,
) -> tuple[TrainState, Array, Array]:
    """Take a step along gradients, unless they or the loss are not finite.

    Args:
        moving: filters of the parameters that `grads` are of, and of the router biases that `load`
            is of; whatever else the model has stays.

    Returns:
        The state, the gradients' norm, and whether the step was taken; if it was not, nothing but
        the count has changed.
    """
    graph, params, biases, fixed = nnx.split(state.model, *moving, ...)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, moments = optimizer.update(grads, state.moments, params)
    params_new = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    biases_new = update_biases(biases, load, bias_update_rate)

    def accept(new: Any, old: Any) -> Any:
        return jax.tree.map(partial(jnp.where, finite), new, old)

    model = nnx.merge(graph, accept(params_new, params), accept(biases_new, biases), fixed)
    state = TrainState(model, accept(moments, state.moments), state.step + 1, state.key)
    return state, grad_norm, finite


def _accumulate(
    gradients: Callable[[Array], tuple[Any, Sums]], slots: int, microbatches: Array
) -> tuple[Any, Sums]:
    """Sum over microbatches, one at a time; a single slot needs no loop."""
    if slots == 1:
        return gradients(jnp.zeros((), jnp.int32))
    shapes = jax.eval_shape(gradients, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(index: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, gradients(index))

    return jax.lax.fori_loop(0, microbatches, add, zeros)


def update_biases(biases: nnx.State, load: Float[Array, "L E"], rate: Array) -> nnx.State:
    """b_i += gamma * sign(mean load - load_i), layer by layer (arXiv:2408.15664, algorithm 1).

    `load` holds main layers, then MTP layers; the state holds them as separate stacks.
    """
    change = rate * jnp.sign(load.mean(-1, keepdims=True) - load)
    flat = nnx.to_flat_state(biases)
    moved, begin = [], 0
    # "moe_layers" before "mtp": the order in which the loads are stacked.
    for path, bias in sorted(flat):
        layers = bias[...].shape[0]
        moved.append((path, bias.replace(bias[...] + change[begin : begin + layers])))
        begin += layers
    return nnx.from_flat_state(moved)


def init_state(config: TrainRunConfig) -> TrainState:
    """Fresh parameters from the run's seed; trace it, or jit it with output shardings."""
    root = jax.random.key(config.seed)
    model = Transformer(
        config.model,
        jax.random.fold_in(root, 0),
        dtype=config.training.compute_dtype,
    )
    return state_of(model, config)


def kept(state: TrainState) -> TrainState:
    """What a checkpoint holds of a state: not the frozen weights under adapters."""
    if not any(isinstance(variable, Frozen) for _, variable in variables(state.model)):
        return state
    _, own, _ = nnx.split(state.model, (nnx.Param, RouterBias), Frozen)
    return state._replace(model=own)


def state_of(model: Transformer, config: TrainRunConfig) -> TrainState:
    """The state before the first step of a run that begins with this model."""
    moments = make_optimizer(config.optimizer).init(nnx.state(model, nnx.Param))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return TrainState(model, moments, jnp.zeros((), jnp.int32), jax.random.key_data(key))
