"""What an export's config.json says is true of the export, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.configs import CONFIGS
from reference.weights import place, random_weights
from released_folders import Weights, weights_of, write_released

import dsjax
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.export_config import QUANTIZATION
from dsjax.checkpoint.families import FP8
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.source import open_source

V3 = CONFIGS["v3"]
UE8M0 = QUANTIZATION | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
NO_KEY: dict[str, Any] = {}

CASES: list[tuple[str, dict[str, Any], str | None, dict[str, Any], str]] = [
    # stored as, quantization_config there, --dtype; quantization_config and torch_dtype then
    (FP8, UE8M0, None, UE8M0, "bfloat16"),
    (FP8, UE8M0, "bfloat16", NO_KEY, "bfloat16"),
    (FP8, BNB, None, QUANTIZATION, "bfloat16"),
    ("BF16", UE8M0, "fp8", QUANTIZATION, "bfloat16"),  # scales are made here, no powers of two
    ("BF16", BNB, None, NO_KEY, "bfloat16"),
]
MORE_CASES: list[tuple[str, dict[str, Any], str | None, dict[str, Any], str]] = [
    (FP8, UE8M0, "fp8", UE8M0, "bfloat16"),  # bits and scales are carried
    (FP8, UE8M0, "float32", NO_KEY, "float32"),
    (FP8, NO_KEY, None, QUANTIZATION, "bfloat16"),
    (FP8, STATIC, "fp8", QUANTIZATION, "bfloat16"),
    ("F32", BNB, "fp8", QUANTIZATION, "bfloat16"),
    ("BF16", UE8M0, None, NO_KEY, "bfloat16"),
    ("F16", NO_KEY, None, NO_KEY, "float16"),
    ("F16", NO_KEY, "float32", NO_KEY, "float32"),
    ("F32", NO_KEY, None, NO_KEY, "float32"),
]


def with_powers(dtype: str) -> Weights:
    """Weights whose scales, where they have some, are powers of two, as those of V3.1."""
    return {
        name: np.exp2(np.ceil(np.log2(weight))) if name.endswith("_scale_inv") else weight
        for name, weight in weights_of(V3, dtype).items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("stored", "there", "dtype", "then", "torch_dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_an_exports_quantization_and_dtype_are_what_was_written(
    tmp_path: Path,
    stored: str,
    there: dict[str, Any],
    dtype: str | None,
    then: dict[str, Any],
    torch_dtype: str,
) -> None:
    """From a released folder, and from dsjax weights that it became."""
    keys: dict[str, Any] = {"quantization_config": there} if there else {}
    write_released(tmp_path / "hf", V3, stored, weights=with_powers(stored), **keys)
    if stored == FP8 and not there:
        tree = config_of(tmp_path / "hf")
        del tree["quantization_config"]
        (tmp_path / "hf/config.json").write_text(json.dumps(tree))
    convert(tmp_path / "hf", tmp_path / "out", to="hf", dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "ours", to="dsjax", dtype=dtype)
    convert(tmp_path / "ours", tmp_path / "back", to="hf")
    for name in ("out", "back"):
        tree = config_of(tmp_path / name)
        assert tree.get("quantization_config", {}) == then, name
        assert tree["torch_dtype"] == torch_dtype
        held = {e.dtype for e in open_source(tmp_path / name).stored.values()}
        assert (FP8 in held) == bool(then)
        assert read_config(tmp_path / name) == V3
    if dtype is None and then == there:  # nothing was untrue
        files = [tmp_path / name / "config.json" for name in ("hf", "out", "back")]
        assert len({file.read_bytes() for file in files}) == 1


def test_other_libraries_files_and_keys_about_quantization_stay_behind(tmp_path: Path) -> None:
    files = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
    write_released(tmp_path / "hf", V3, "BF16")
    tree = config_of(tmp_path / "hf") | {"compression_config": {"format": "dense"}, "dtype": "x"}
    (tmp_path / "hf/config.json").write_text(json.dumps(tree))
    for name in files:
        (tmp_path / "hf" / name).write_text("{}")
    convert(tmp_path / "hf", tmp_path / "out", to="hf", dtype="float32")
    tree = config_of(tmp_path / "out")
    assert "compression_config" not in tree
    assert tree["dtype"] == tree["torch_dtype"] == "float32"  # both names of one thing
    assert not [name for name in files if (tmp_path / "out" / name).exists()]


@pytest.mark.slow
def test_a_saved_model_is_described_as_it_is_written(tmp_path: Path) -> None:
    """In FP8 and not, straight and by dsjax weights, which have no config.json of their own."""
    write_released(tmp_path / "fp8", V3, FP8)
    fp8, plain = dsjax.load(tmp_path / "fp8"), place(V3, random_weights(V3))
    for name, model, then, torch_dtype in (
        ("a", fp8, QUANTIZATION, "bfloat16"),
        ("b", plain, NO_KEY, "float32"),
    ):
        dsjax.save(model, tmp_path / name, format="hf")
        dsjax.save(model, tmp_path / f"{name}-ours")
        convert(tmp_path / f"{name}-ours", tmp_path / f"{name}-back")
        convert(tmp_path / f"{name}-ours", tmp_path / f"{name}-wide", to="hf", dtype="bfloat16")
        for folder in (name, f"{name}-back"):
            tree = config_of(tmp_path / folder)
            assert tree.get("quantization_config", {}) == then
            assert tree["torch_dtype"] == torch_dtype
        tree = config_of(tmp_path / f"{name}-wide")
        assert "quantization_config" not in tree and tree["torch_dtype"] == "bfloat16"
        assert tree["num_nextn_predict_layers"] == V3.num_nextn_predict_layers
        assert tree["architectures"] == ["DeepseekV3ForCausalLM"] and "auto_map" not in tree


def test_scales_of_an_export_that_says_ue8m0_are_powers_of_two(tmp_path: Path) -> None:
    """Some of V3.1-Terminus's are not, though it says so."""
    powers, others = with_powers(FP8), weights_of(V3, FP8)
    mixed = powers | {n: w for n, w in others.items() if n.endswith("o_proj.weight_scale_inv")}
    for name, weights in (("powers", powers), ("mixed", mixed)):
        write_released(tmp_path / name, V3, FP8, weights=weights, quantization_config=UE8M0)
        convert(tmp_path / name, tmp_path / f"{name}-out", to="hf")
    convert(tmp_path / "powers", tmp_path / "wide", to="hf", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "anew", to="hf", dtype="fp8")
    for name, says in (("powers-out", "ue8m0"), ("mixed-out", None), ("anew", None)):
        described = config_of(tmp_path / name)["quantization_config"]
        assert described.get("scale_fmt") == says and described["quant_method"] == "fp8"
