"""The loss over what is trained: by an independent formula, and however rows are arranged."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config_files import load_pretrain_config
from dsjax.model.layers import RouterBias, tree_shardings, variables
from dsjax.training.step import Batch, init_state, make_gradients, target_counts
from sharding.mesh import make_mesh
from sharding.rules import TRAIN_RULES, Layout, use_layout

LENGTH, MTP = 16, jnp.float32(0.3)
CONFIG = load_pretrain_config(
    "cpu-tiny",
    [f"data.sequence_length={LENGTH}", "model.vocab_size=64", "model.num_hidden_layers=2",
     "training.loss_chunk=8", "training.balance_loss_weight=0"],
)  # fmt: skip


def examples(count=8):
    """Tokens, and which are trained: the ends of some, and pieces in the middle."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = 5 + number % 4
        trained = np.arange(size) >= 2 + number % 3
        trained[-2] &= number % 2 == 0
        found.append((rng.integers(0, 64, size, np.int32), trained))
    return found


def arrange(rows, shape, pad=0, left=False):
    """Rows of examples as a batch, what is empty filled with a token, on either side."""
    flat = (int(np.prod(shape[:-1])), shape[-1])
    tokens, ids = np.full(flat, pad, np.int32), np.zeros(flat, np.int32)
    trained = np.zeros(flat, bool)
    for row, members in enumerate(rows):
        at = flat[1] - sum(len(t) for t, _ in members) if left else 0
        for segment, (content, marks) in enumerate(members, start=1):
            here = slice(at, at + len(content))
            tokens[row, here], ids[row, here], trained[row, here] = content, segment, marks
            at += len(content)
    return Batch(*(jnp.asarray(x.reshape(shape)) for x in (tokens, ids, trained)))


EXAMPLES = examples()
ALONE = [[example] for example in EXAMPLES]
PAIRS = [[EXAMPLES[i], EXAMPLES[7 - i]] for i in range(4)]


@pytest.fixture(scope="module")
def model():
    made = jax.jit(partial(init_state, CONFIG))().model
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, made)


@pytest.fixture(scope="module")
def gradients():
    return jax.jit(make_gradients(CONFIG))


@pytest.fixture(scope="module")
def want(model, gradients):
    return gradients(model, arrange(ALONE, (4, 2, LENGTH)), jnp.int32(4), MTP)


def same(found, want, tolerance=1e-5):
    for name in ("loss", "mtp_loss"):
        np.testing.assert_allclose(getattr(found[1], name), getattr(want[1], name), rtol=tolerance)
    for (name, one), (_, other) in zip(variables(found[0]), variables(want[0]), strict=True):
        expected = np.asarray(other[...])
        scale = max(np.abs(expected).max(), 1e-30)
        assert np.abs(np.asarray(one[...]) - expected).max() <= tolerance * scale, name


def test_loss_and_gradients_are_those_of_the_plain_formula(model, want):
    """-1/N sum over trained tokens of log softmax(logits at the place before), and so for MTP."""
    graph, params, biases = nnx.split(model, nnx.Param, RouterBias)
    batch = arrange(ALONE, (8, LENGTH))
    tokens, trained = np.asarray(batch.tokens), np.asarray(batch.trained)

    def plain(params):
        out = nnx.merge(graph, params, biases)(batch.tokens, segment_ids=batch.segment_ids)
        losses = []
        for by, logits in enumerate((out.logits, *out.mtp_logits), start=1):
            log_p = jax.nn.log_softmax(logits, axis=-1)
            # Examples begin at place 0: all that a row trains from place `by` on has a prediction.
            rows, places = np.nonzero(trained[:, by:])
            picked = log_p[rows, places, tokens[rows, places + by]]
            losses.append(-picked.sum() / len(rows))
        return losses[0] + MTP * losses[1], jnp.stack(losses)

    expected, losses = jax.jit(jax.grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(want[1].loss, losses[0], rtol=1e-5)
    np.testing.assert_allclose(want[1].mtp_loss, losses[1:], rtol=1e-5)
    same(want, (expected, want[1]))


@pytest.mark.parametrize(
    ("rows", "settings"),
    [(ALONE[::-1], {}), (PAIRS, {}), (PAIRS, {"left": True}), (ALONE, {"pad": 1, "left": True})],
    ids=["another_order", "packed", "packed_and_padded_left", "padded_left_with_eos"],
)
def test_the_loss_does_not_depend_on_the_arrangement(model, gradients, want, rows, settings):
    batch = arrange(rows, (4, 2, LENGTH), **settings)
    same(gradients(model, batch, jnp.int32(len(rows) // 2), MTP), want)


def test_the_loss_does_not_depend_on_microbatches(model, want):
    batch = arrange(ALONE, (1, 8, LENGTH))
    same(jax.jit(make_gradients(CONFIG))(model, batch, jnp.int32(1), MTP), want)


def test_targets_are_what_is_trained_within_its_document():
    segments = jnp.array([[[1, 1, 1, 2, 2, 0]]])
    trained = jnp.array([[[True, True, False, True, True, True]]])
    np.testing.assert_array_equal(target_counts(segments, 1, trained), [2, 0])


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does(model, want):
    layout = Layout(make_mesh({"fsdp": 2, "context": 2, "tensor": 2}), TRAIN_RULES)
    batch = arrange(ALONE, (4, 2, LENGTH))
    with use_layout(layout):
        placed = jax.device_put(model, tree_shardings(model, layout))
        rows = layout.sharding((None, "batch", None), batch.tokens.shape)
        found = jax.jit(make_gradients(CONFIG))(
            placed, jax.device_put(batch, rows), jnp.int32(4), MTP
        )
    same(found, want)
