"""Files that transformers writes, in bfloat16, and with MTP layers added by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import numpy_model
from safetensors.numpy import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from dsjax.checkpoint.from_files import load_files
from dsjax.model.layers import RouterBias, variables
from dsjax.model.transformer import Transformer

from .models import make_model, v3_config

LENGTH, DEPTHS = 48, 2

forward = jax.jit(lambda model, tokens: (lambda out: (out.logits, out.mtp_logits))(model(tokens)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    config = v3_config("wide", low_rank=True, yarn=True, groups=True)
    make_model(DeepseekV3ForCausalLM, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 224, (2, LENGTH), dtype=np.int32)


@pytest.fixture(scope="module")
def bfloat16(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    half = tmp_path_factory.mktemp("bfloat16")
    DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    return half


def test_bfloat16_weights_compute_what_transformers_computes_in_float32(
    bfloat16: Path, tokens: np.ndarray
) -> None:
    theirs = DeepseekV3ForCausalLM.from_pretrained(bfloat16, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found, _ = forward(load_files(bfloat16, dtype="float32"), tokens)
    assert np.abs(np.asarray(found) - expected).max() < 1e-4 * np.abs(expected).max()


def test_bfloat16_weights_stay_as_stored_and_compute_close_to_float32(
    bfloat16: Path, tokens: np.ndarray
) -> None:
    model = load_files(bfloat16)
    assert model.dtype == jnp.bfloat16
    for name, leaf in variables(model):
        assert leaf[...].dtype == (jnp.float32 if isinstance(leaf, RouterBias) else jnp.bfloat16), (
            name
        )
    exact, _ = forward(load_files(bfloat16, dtype="float32"), tokens)
    found, _ = forward(model, tokens)
    gap = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    # A few tokens go to another expert, where two scores nearly tie.
    assert np.median(gap) < 0.03


@pytest.fixture(scope="module")
def ahead(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with two MTP layers, under the released names."""
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layers, size = config["num_hidden_layers"], config["hidden_size"]
    rng = np.random.default_rng(7)
    last = f"model.layers.{layers - 1}."
    shapes = {n.removeprefix(last): w.shape for n, w in weights.items() if n.startswith(last)}
    shapes |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (size,))
    shapes |= {"eh_proj.weight": (size, 2 * size)}
    for depth in range(DEPTHS):
        mine = f"model.layers.{layers + depth}."
        for name, shape in shapes.items():
            noise = rng.normal(size=shape)
            spread = 0.8 if "bias" in name else shape[-1] ** -0.5
            value = 1 + 0.2 * noise if "norm" in name else spread * noise
            weights[mine + name] = value.astype(np.float32)
        weights[mine + "embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
        weights[mine + "shared_head.head.weight"] = weights["lm_head.weight"].copy()
    result = tmp_path_factory.mktemp("mtp")
    save_file(weights, result / "model.safetensors")
    # The newest transformers calls the key by two names.
    config |= {"num_nextn_predict_layers": DEPTHS, "num_mtp_layers": DEPTHS}
    (result / "config.json").write_text(json.dumps(config))
    return result


def test_hand_written_mtp_layers_predict_what_the_reference_does(
    ahead: Path, tokens: np.ndarray
) -> None:
    model: Transformer = load_files(ahead)
    logits, mtp_logits = forward(model, tokens)
    config: dict[str, Any] = json.loads((ahead / "config.json").read_text())
    rope = config["rope_parameters"]
    plain = config | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    weights = load_file(ahead / "model.safetensors")
    rows = [numpy_model.run(plain, weights, row, np.arange(LENGTH)) for row in tokens]
    assert _off(logits, [row.logits for row in rows]) < 1e-5
    assert len(mtp_logits) == DEPTHS
    for depth, found in enumerate(mtp_logits, start=1):
        assert _off(found[:, :-depth], [row.mtp_logits[depth - 1] for row in rows]) < 1e-5


def test_transformers_folders_load_without_mtp_and_say_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_files(folder).mtp is None
    assert "config.json promises MTP layers, but the files hold none" in capsys.readouterr().err


def _off(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
