"""Held-out evaluation: loss, bits per byte, MTP acceptance and expert balance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsjax.data.held_out import HeldOutRows
from dsjax.model.layers import tree_places
from dsjax.model.mtp import reaches, shift
from dsjax.model.transformer import Transformer
from dsjax.training.loss import token_scores
from dsjax.training.step import max_violation
from sharding.by_hand import by_hand, sequence_part, summed, summed_over_tokens, whole_sequence
from sharding.rules import place


class Scores(NamedTuple):
    """Sums over rows; they add up."""

    nats: Float[Array, ""]
    """-log p of all scored tokens."""
    tokens: Int[Array, ""]
    accepted: Int[Array, ""]
    """Places where the first MTP depth's likeliest token is the one the main model says next."""
    drafted: Int[Array, ""]
    load: Float[Array, "L E"]


class Evaluation(NamedTuple):
    """What held-out text says of a model."""

    loss: float
    """Mean nats a token."""
    bits_per_byte: float
    acceptance: float
    """Share of first-depth MTP drafts that greedy decoding would accept; NaN without MTP."""
    max_violation: list[float]
    """MaxVio of each expert layer over all rows, MTP layers last."""
    load: list[list[float]]
    """Each expert's share of its layer's pairs."""


def score_rows(
    model: Transformer,
    tokens: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    scored: Bool[Array, "B S"],
    *,
    chunk: int,
) -> Scores:
    """Score some rows. A draft is accepted where MTP at i and the main model at i + 1 agree."""

    def of_parts(model: Transformer, tokens: Array, segment_ids: Array, scored: Array) -> Scores:
        out = model(tokens, segment_ids=segment_ids)
        ahead = model.look_ahead(out)
        head = model.head_weight(out.hidden.dtype)

        def whole(hidden: Array, by: int) -> tuple[Array, Array]:
            """Scores of every place: a draft's neighbour may lie on another device."""
            nll, best = token_scores(hidden, head, sequence_part(shift(tokens, by)), chunk)
            return whole_sequence(nll), whole_sequence(best)

        nll, best = whole(out.hidden, 1)
        accepted = drafted = jnp.zeros((), jnp.int32)
        if ahead.hidden:
            _, draft = whole(ahead.hidden[0], 2)
            both = scored & reaches(segment_ids, 2)
            drafted = both.sum()
            accepted = (both & (draft == shift(best, 1))).sum()
        of_rows = (nll * scored).sum(), scored.sum(), accepted, drafted
        nats, count, accepted, drafted = (summed(x, "batch") for x in of_rows)
        load = summed_over_tokens(jnp.concatenate([out.load, ahead.load]))
        return Scores(nats, count, accepted, drafted, load)

    rows = place(tokens.shape, "batch", None)
    run = by_hand(of_parts, (tree_places(model), rows, rows, rows), PartitionSpec())
    return run(model, tokens, segment_ids, scored)


def batches_of(rows: HeldOutRows, size: int, limit: int | None) -> Iterator[tuple[np.ndarray, ...]]:
    """Held-out rows in batches of one shape, empty rows filling the last; at most `limit`."""
    count = math.ceil(len(rows.tokens) / size)
    for index in range(count if limit is None else min(limit, count)):
        part = slice(index * size, (index + 1) * size)
        arrays = rows.tokens[part], rows.segment_ids[part], rows.scored[part]
        missing = size - len(arrays[0])
        yield tuple(np.pad(array, ((0, missing), (0, 0))) for array in arrays)


def summarize(total: Scores, rows: HeldOutRows) -> Evaluation:
    """Turn sums into figures; bits per byte of a sample assume the sample is fair."""
    loss = float(total.nats) / max(int(total.tokens), 1)
    load = np.asarray(total.load)
    share = load / np.maximum(load.sum(-1, keepdims=True), 1)
    drafted = int(total.drafted)
    return Evaluation(
        loss=loss,
        bits_per_byte=rows.bits_per_byte(loss * float(rows.scored.sum())),
        acceptance=int(total.accepted) / drafted if drafted else math.nan,
        max_violation=[float(v) for v in max_violation(jnp.asarray(load))],
        load=share.tolist(),
    )


def add_scores(one: Scores | None, other: Scores) -> Scores:
    """The sum, on the host in float64: float32 would lose counts over a large held-out set."""
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), other)
    return exact if one is None else jax.tree.map(np.add, one, exact)
