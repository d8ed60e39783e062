"""Adapters say in PEFT what they say here, beside the weights and merged into them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

from dsjax.checkpoint.adapters import adapted, cut_adapters
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.load import load
from dsjax.checkpoint.peft import peft_files
from dsjax.config_sft import LoraConfig
from dsjax.model.layers import variables
from dsjax.model.lora import add_adapters
from dsjax.model.transformer import Transformer

from .models import CASES, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LORA = LoraConfig(rank=4, alpha=6.0)
CLOSE = 1e-4
NAMES = ["v3_narrow_q_lora_rope_groups", "qwen3"]


@pytest.fixture(params=NAMES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A model of transformers, and its folder."""
    kind, config = CASES[request.param]
    theirs = make_model(kind, config())
    theirs.save_pretrained(tmp_path / "base")
    return theirs, tmp_path / "base"


@jax.jit
def logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens).logits


def tokens_for(model: Transformer) -> np.ndarray:
    shape = 2, 24
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype=np.int32)


def with_adapters(model: Transformer) -> Transformer:
    """With adapters whose B is no longer zero."""
    add = partial(add_adapters, rank=LORA.rank, alpha=LORA.alpha)
    paths = list(adapted(model.config, None))
    made = jax.jit(lambda m, key: add(m, paths, key))(model, jax.random.key(1))
    for number, (_, variable) in enumerate(variables(nnx.state(made, nnx.Param))):
        drawn = jax.random.normal(jax.random.key(number), variable.shape)
        variable[...] = 0.1 * drawn
    return made


def test_ours_open_in_peft_and_all_three_say_the_same(
    base: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    model = load(folder, jnp.float32)
    tokens = tokens_for(model)
    plain = np.asarray(logits(model, tokens))
    graph, trained, rest = nnx.split(with_adapters(model), nnx.Param, ...)
    ours = np.asarray(logits(nnx.merge(graph, trained, rest), tokens))
    arrays = {name: np.asarray(value[...]) for name, value in variables(trained)}
    lows = cut_adapters(model.config, LORA, arrays)
    (tmp_path / "adapter").mkdir()
    for name, data in peft_files(model.config, LORA, lows, str(folder)).items():
        (tmp_path / "adapter" / name).write_bytes(data)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        in_peft = opened(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    convert(folder, tmp_path / "merged", to="hf", adapter=tmp_path / "adapter")
    merged = np.asarray(logits(load(tmp_path / "merged", jnp.float32), tokens))
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(in_peft, ours, atol=CLOSE, rtol=CLOSE)
    np.testing.assert_allclose(merged, ours, atol=CLOSE, rtol=CLOSE)


def test_what_peft_saved_is_merged_as_peft_merges_it(
    base: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    settings = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, init_lora_weights=False,
                               target_modules=["q_b_proj", "q_proj", "o_proj"])  # fmt: skip
    torch.manual_seed(0)
    made = peft.get_peft_model(theirs, settings)
    made.save_pretrained(tmp_path / "adapter")
    convert(folder, tmp_path / "merged", to="hf", adapter=tmp_path / "adapter")
    model = load(tmp_path / "merged", jnp.float32)
    tokens = tokens_for(model)
    with torch.no_grad():
        want = made(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    assert np.abs(want - np.asarray(logits(load(folder, jnp.float32), tokens))).max() > 0.1
    np.testing.assert_allclose(np.asarray(logits(model, tokens)), want, atol=CLOSE, rtol=CLOSE)
