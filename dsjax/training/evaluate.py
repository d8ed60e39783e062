"""Held-out evaluation: loss, bits per byte, MTP acceptance and expert balance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsjax.data.held_out import HeldOutRows
from dsjax.model.mtp import reaches, shift
from dsjax.model.transformer import Transformer
from dsjax.training.loss import token_scores
from dsjax.training.step import max_violation


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
    out = model(tokens, segment_ids=segment_ids)
    ahead = model.look_ahead(out)
    head = model.head_weight(out.hidden.dtype)
    nll, best = token_scores(out.hidden, head, shift(tokens, 1), chunk)
    accepted = drafted = jnp.zeros((), jnp.int32)
    if ahead.hidden:
        _, draft = token_scores(ahead.hidden[0], head, shift(tokens, 2), chunk)
        both = scored & reaches(segment_ids, 2)
        drafted = both.sum()
        accepted = (both & (draft == shift(best, 1))).sum()
    load = jnp.concatenate([out.load, ahead.load])
    return Scores((nll * scored).sum(), scored.sum(), accepted, drafted, load)


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
