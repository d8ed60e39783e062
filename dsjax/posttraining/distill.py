"""Distillation on logits: a student learns its teacher's distribution over answers.

On answers that a teacher has written, distillation is supervised tuning (`task: sft`), and so R1's
distills were made. Where teacher and student spell text alike, there is more to learn from than the
one token that was drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from dsjax.checkpoint.load import load_on
from dsjax.checkpoint.source import model_of
from dsjax.config_sft import DistillConfig, TeacherConfig
from dsjax.data.language import check_vocabulary, read_language
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from dsjax.posttraining.divergence import divergence
from dsjax.posttraining.sft import prepare
from dsjax.training.loss import cross_entropy
from dsjax.training.run import together, train
from dsjax.training.step import Metrics, Sums, TrainState, batch_loss, make_train_step
from sharding.rules import Layout


def distill(config: DistillConfig, console: Console) -> None:
    """Train as `sft` does, towards a teacher's distribution over the answers' tokens.

    Raises:
        UserError: as `sft`; or the teacher is none, or spells text otherwise than the student.
    """
    with together(config, console) as console:
        known = check_teacher(config)
        run = prepare(config, console)
        train(
            dataclasses.replace(
                run,
                make_step=partial(make_distill_step, config.teacher, known),
                beside=lambda: (_teacher(config, run.layout),),
            ),
            console,
        )


def check_teacher(config: DistillConfig) -> int:
    """How many ids student and teacher have; their models may be padded to other sizes.

    Raises:
        UserError: they have not one tokenizer, or the rows are too long for the teacher.
    """
    where = config.teacher.checkpoint
    theirs, length = model_of(where), config.data.sequence_length
    tokenizer = read_language(where).tokenizer
    check_vocabulary(tokenizer, theirs.vocab_size, where)
    if tokenizer.digest != read_language(config.init).tokenizer.digest:
        raise UserError(
            f"teacher.checkpoint={where}: its tokenizer is not that of {config.init}; choose a "
            "teacher of the same tokenizer, or let it write answers, and learn from them by "
            "task: sft"
        )
    if length > theirs.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={length} is beyond the max_position_embeddings="
            f"{theirs.max_position_embeddings} of {where}; choose a shorter one"
        )
    return tokenizer.vocab_size


def _teacher(config: DistillConfig, layout: Layout) -> Transformer:
    """Its weights on the mesh, in the dtype that is computed in."""
    dtype = jnp.dtype(config.training.compute_dtype)
    model = load_on(config.teacher.checkpoint, dtype, layout)
    # As many rows as the student's, so that devices which share a vocabulary have the same ids.
    size = config.model.vocab_size
    for layer in (model.embed, *([] if model.head is None else [model.head])):
        weight = layer.weight[...][:size]
        layer.weight.set_value(jnp.pad(weight, ((0, size - len(weight)), (0, 0))))
    return jax.device_put(model, tree_shardings(model, layout))


def make_distill_step(
    teacher: TeacherConfig, known: int, config: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
    """As `make_train_step`; the step takes the teacher's model as its last argument."""
    how = {"known": known, "temperature": teacher.temperature, "share": teacher.weight}
    loss = partial(distill_loss, **how)
    return make_train_step(config, loss)


def distill_loss(
    model: Transformer,
    tokens: Array,
    segment_ids: Array,
    counts: Array,
    rows: Array,
    mtp_weight: Array,
    trained: Array | None,
    teacher: Transformer,
    *,
    known: int,
    temperature: float,
    share: float,
    **settings: Any,
) -> tuple[Array, Sums]:
    """`batch_loss`, in which the main model's places count, for answers' tokens,

    share * T^2 KL(teacher || student) + (1 - share) * cross-entropy
    """
    out = jax.lax.stop_gradient(teacher(tokens, segment_ids=segment_ids))
    teacher_head = teacher.head_weight(out.hidden.dtype)

    def main(hidden: Array, head: Array, targets: Array, weights: Array, chunk: int) -> Array:
        theirs = out.hidden, teacher_head
        far: Array = divergence(hidden, head, *theirs, weights, known, temperature, chunk)
        if share == 1:
            return far
        own: Array = cross_entropy(hidden, head, targets, weights, chunk)
        return share * far + (1 - share) * own

    return batch_loss(
        model, tokens, segment_ids, counts, rows, mtp_weight, trained, main=main, **settings
    )
