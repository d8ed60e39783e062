"""The model computes what the papers say: every output against plain numpy, switch by switch."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_model
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig

from .conftest import LENGTH, ROWS, Forward, forward, off, random_tokens

EXACT = 1e-5
"""float32 against float64, in units of the largest number; what is measured is below 1e-6."""


class Case(NamedTuple):
    config: DeepSeekConfig
    found: Forward
    expected: list[numpy_model.Prediction]


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> Case:
    config = CONFIGS[request.param]
    weights = random_weights(config)
    tokens = random_tokens(config, (ROWS, LENGTH))
    # Positions with gaps, past YaRN's original length.
    rng = np.random.default_rng(2)
    positions = np.sort([rng.choice(100, LENGTH, replace=False) for _ in range(ROWS)])
    assert positions.max() > 64
    found = forward(place(config, weights), jnp.asarray(tokens), jnp.asarray(positions))
    plain = config.model_dump()
    expected = [
        numpy_model.run(plain, weights, *row) for row in zip(tokens, positions, strict=True)
    ]
    return Case(config, found, expected)


def test_the_weights_exercise_the_routing(case: Case) -> None:
    routed = [sent for row in case.expected for sent in row.routed + row.mtp_routed]
    assert all(sent.scores.std() > 0.05 for sent in routed)
    assert any((sent.biased < 0).any() for sent in routed) == case.config.has_router_bias


def test_hidden_states_and_logits_equal_the_reference(case: Case) -> None:
    assert off(case.found.hidden, [row.hidden for row in case.expected]) < EXACT
    assert off(case.found.logits, [row.logits for row in case.expected]) < EXACT
    assert case.found.logits.dtype == jnp.float32


def test_mtp_logits_equal_the_reference(case: Case) -> None:
    assert len(case.found.mtp_logits) == case.config.num_nextn_predict_layers
    for depth, logits in enumerate(case.found.mtp_logits, start=1):
        expected = [row.mtp_logits[depth - 1] for row in case.expected]
        assert off(logits[:, :-depth], expected) < EXACT


def test_loads_equal_the_reference(case: Case) -> None:
    for layer, load in enumerate(case.found.load):
        assert (load == sum(row.routed[layer].chosen.sum(0) for row in case.expected)).all()
    for depth, load in enumerate(case.found.mtp_load):
        assert (load == sum(row.mtp_routed[depth].chosen.sum(0) for row in case.expected)).all()


def test_balance_losses_equal_the_reference(case: Case) -> None:
    plain = case.config.model_dump()
    main = zip(*(row.routed for row in case.expected), strict=True)
    ahead = zip(*(row.mtp_routed for row in case.expected), strict=True)
    for losses, layers in ((case.found.balance_loss, main), (case.found.mtp_balance_loss, ahead)):
        for loss, rows in zip(losses, layers, strict=True):
            expected = sum(numpy_model.balance_loss(plain, row.scores) for row in rows)
            assert abs(float(loss) - expected) < EXACT * expected
