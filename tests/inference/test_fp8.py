"""The engine over a model in FP8, on one device and on eight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dsjax
from dsjax.inference.engine import Engine
from dsjax.inference.request import Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from tests.checkpoint.released_folders import BLOCKS, write_released

from .conftest import CONTEXT, Finished, run, whole_logits

pytestmark = pytest.mark.slow

# An expert layer and an MTP layer: more would add to the compiler's work only.
CONFIG = BLOCKS.model_copy(update={"num_hidden_layers": 1, "first_k_dense_replace": 0})
PROMPTS = [[5, 9, 2], [3] * 5 + [40, 41, 42]]
ROUNDING = 0.1
"""What two ways to sum in bfloat16 can differ by, of logits whose spread is 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "hf"
    write_released(folder, CONFIG, "F8_E4M3")
    return folder


def continued(model: Transformer) -> dict[str, Finished]:
    engine = Engine(model, EngineSettings(rows=1, context=CONTEXT))
    sampling = SamplingParams(12, temperature=0.0)
    return run(engine, [Request(str(i), tuple(p), sampling) for i, p in enumerate(PROMPTS)])


def check_greedy(made: dict[str, Finished], wide: Transformer) -> None:
    """Every token is the widened model's likeliest, or nearly so; print by how much."""
    for number, prompt in enumerate(PROMPTS):
        tokens = made[str(number)].tokens
        assert len(tokens) == 12
        logits = whole_logits(wide, prompt + tokens)[len(prompt) - 1 : -1]
        best, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
        short = best - logits[np.arange(len(tokens)), tokens]
        print(f"margins {(best - second).min():.3f} at least, {short.max():.3f} short at most")
        assert (short < ROUNDING).all()


def test_greedy_tokens_are_those_of_the_widened_model(folder: Path) -> None:
    """Drafts and all: the two run programs that differ in nothing but where they widen."""
    wide = dsjax.load(folder, dtype="bfloat16")
    found, expected = continued(dsjax.load(folder)), continued(wide)
    assert {i: one.tokens for i, one in found.items()} == {
        i: one.tokens for i, one in expected.items()
    }
    check_greedy(found, wide)


def test_eight_devices_continue_a_model_in_fp8(folder: Path) -> None:
    model = dsjax.load(folder, mesh=make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    check_greedy(continued(model), dsjax.load(folder, dtype="bfloat16"))
