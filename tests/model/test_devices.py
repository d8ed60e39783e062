"""A model on several devices answers as on one, and recomputation changes nothing."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig
from dsjax.errors import UserError
from dsjax.model.layers import tree_shardings, variables
from dsjax.model.transformer import Remat, Transformer
from sharding.mesh import make_mesh
from sharding.rules import DECODE_RULES, Layout, use_layout

from .conftest import random_tokens
from .training_loss import largest_difference, loss_and_gradient

ROWS, LENGTH = 8, 32
EXACT = 1e-5


@pytest.fixture(scope="module")
def model(config: DeepSeekConfig) -> Transformer:
    """Expert layers and an MTP layer; a dense layer would add only to the compiler's work."""
    changes = {"first_k_dense_replace": 0, "num_hidden_layers": 2}
    shallow = config.model_copy(update=changes)
    return place(shallow, random_weights(shallow))


@pytest.fixture(scope="module")
def batch(model: Transformer) -> tuple[jax.Array, jax.Array]:
    """Rows of two documents each, the last row with padding."""
    tokens = jnp.asarray(random_tokens(model.config, (ROWS, LENGTH)))
    segments = np.where(np.arange(LENGTH) < 20, 1, 2)[None].repeat(ROWS, axis=0)
    segments[-1, 28:] = 0
    return tokens, jnp.asarray(segments.astype(np.int32))


@pytest.fixture(scope="module")
def on_one_device(model: Transformer, batch: tuple[jax.Array, jax.Array]) -> Any:
    return jax.jit(partial(loss_and_gradient, remat="keep_all"))(model, *batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat",
    [
        "keep_matmuls",
        "keep_attention",
        "keep_layer_inputs",
        "keep_layer_inputs_on_host",
    ],
)
def test_recomputation_leaves_the_gradients_as_they_are(
    model: Transformer, batch: tuple[jax.Array, jax.Array], on_one_device: Any, remat: Any
) -> None:
    (loss, sums), gradient = jax.jit(partial(loss_and_gradient, remat=remat))(model, *batch)
    (expected_loss, expected_sums), expected = on_one_device
    assert largest_difference(gradient, expected) < 1e-6
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert (sums.load == expected_sums.load).all()


@pytest.mark.parametrize("remat", get_args(Remat))
def test_experts_are_chosen_once_whatever_is_recomputed(
    model: Transformer, batch: tuple[jax.Array, jax.Array], remat: Any
) -> None:
    """The choice is kept: made again, from scores rounded otherwise, it might be another one."""
    chosen, trained = (
        str(jax.make_jaxpr(function)(model, *batch)).count(" top_k[")
        for function in (
            lambda model, tokens, ids: model.look_ahead(model(tokens, segment_ids=ids)).load,
            partial(loss_and_gradient, remat=remat),
        )
    )
    assert trained == chosen > 0


@pytest.mark.slow
def test_a_model_on_a_mesh_answers_as_on_one_device(
    model: Transformer, batch: tuple[jax.Array, jax.Array]
) -> None:
    """Plain calls, of a loaded model: XLA places what lies between the constraints."""
    layout = Layout(make_mesh({"data": 2, "expert": 2, "tensor": 2}), DECODE_RULES)
    placed = jax.device_put(model, tree_shardings(model, layout))
    tokens, segments = batch
    spread = [jax.device_put(x, layout.sharding(("batch", None), x.shape)) for x in batch]

    def answers(model: Transformer, tokens: jax.Array, segments: jax.Array) -> Any:
        out = model(tokens, segment_ids=segments)
        return out.logits, out.mtp_logits, out.load

    expected = jax.jit(answers)(model, tokens, segments)
    with use_layout(layout):
        found = jax.jit(answers)(placed, *spread)
    (logits, ahead, load), (want, want_ahead, want_load) = found, expected
    assert (load == want_load).all()
    assert abs(logits - want).max() < EXACT * abs(want).max()
    assert abs(ahead[0] - want_ahead[0]).max() < EXACT * abs(want_ahead[0]).max()


def test_weights_are_split_and_not_only_labelled(model: Transformer) -> None:
    layout = Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    placed = jax.device_put(model, tree_shardings(model, layout))
    parts = {
        name: leaf[...].addressable_shards[0].data.size / leaf[...].size
        for name, leaf in variables(placed)
    }
    assert parts["moe_layers.ffn.experts.gate"] == 1 / 8
    assert parts["moe_layers.attn.kv_b.weight"] == 1 / 8
    assert parts["embed.weight"] == parts["head.weight"] == 1 / 8
    assert parts["norm.weight"] == parts["moe_layers.ffn.router.bias"] == 1


def test_constraints_are_live(model: Transformer) -> None:
    """They split what nothing else would, and refuse what does not divide."""
    layout = Layout(make_mesh({"data": 8}))
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    with use_layout(layout):
        embedded = jax.jit(lambda model, tokens: model._embed(tokens))(model, tokens)
        assert embedded.sharding.shard_shape(embedded.shape) == (1, LENGTH, embedded.shape[2])
        with pytest.raises(UserError, match=r"batch=3 is not divisible by the 8 devices"):
            jax.eval_shape(lambda model, tokens: model(tokens).hidden, model, tokens[:3])


def test_outside_a_layout_nothing_is_constrained(model: Transformer) -> None:
    hidden = jax.eval_shape(
        lambda model, tokens: model(tokens).hidden, model, jnp.zeros((3, 8), jnp.int32)
    )
    assert hidden.shape == (3, 8, model.config.hidden_size)
