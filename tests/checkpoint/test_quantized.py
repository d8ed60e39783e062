"""FP8 of other makers means here what it means there; other quantized formats are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference.configs import DENSE_CONFIGS
from released_folders import BLOCKS, BLOCKS_DENSE, Weights, weights_of, write_released

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.families import FP8, tensors
from dsjax.checkpoint.from_files import load_files
from dsjax.checkpoint.source import open_source
from dsjax.errors import UserError
from dsjax.model.layers import variables

OWN = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"} | weights}
    }
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": groups}  # fmt: skip


FORMS: dict[str, tuple[dict[str, Any], tuple[int, int], str, Any, str, str]] = {
    # quantization_config, sides of a block, name and dtype of scales; how weights are then held,
    # and what is said
    "Qwen's": (OWN, (128, 128), "_scale_inv", ml_dtypes.bfloat16, FP8, "in BF16 are widened"),
    "float16": (OWN, (128, 128), "_scale_inv", np.float16, FP8, "in F16 are widened"),
    "e8m0": (OWN, (128, 128), "_scale_inv", ml_dtypes.float8_e8m0fnu, FP8, "in F8_E8M0 are"),
    "no config": ({}, (128, 128), "_scale_inv", ml_dtypes.bfloat16, FP8, "in BF16 are widened"),
    "a scale a tensor": (STATIC, (0, 0), "_scale", np.float32, FP8, "larger blocks are repeated"),
    "modelopt's": ({"quant_method": "modelopt", "quant_algo": "FP8"}, (0, 0), "_scale", np.float32,
                   FP8, "of larger blocks are repeated"),
    "hf_quant_config.json's": ({}, (0, 0), "_scale", np.float32, FP8, "larger blocks are repeated"),
    "larger blocks": (OWN | {"weight_block_size": [256, 128]}, (256, 128), "_scale_inv",
                      np.float32, FP8, "of larger blocks are repeated"),
    "compressed blocks": (compressed(strategy="block", block_structure=[128, 128]), (128, 128),
                          "_scale", ml_dtypes.bfloat16, FP8, "in BF16 are widened"),
    "a scale a row": (compressed(strategy="channel"), (1, 0), "_scale", ml_dtypes.bfloat16, "F32",
                      "are read as float32"),
    "smaller blocks": (OWN | {"weight_block_size": [64, 32]}, (64, 32), "_scale_inv", np.float32,
                       "F32", "are read as float32"),
}  # fmt: skip


def with_scales(
    weights: Weights, block: tuple[int, int], name: str, dtype: Any
) -> tuple[Weights, Weights]:
    """The same FP8 values under other scales, and what they then mean, in float32."""
    rng = np.random.default_rng(0)
    stored = {n: w for n, w in weights.items() if not n.endswith("_scale_inv")}
    meant: Weights = {}
    for key, values in list(stored.items()):
        if values.dtype != ml_dtypes.float8_e4m3fn:
            continue
        rows, columns = (size or whole for size, whole in zip(block, values.shape, strict=True))
        grid = -(-values.shape[0] // rows), -(-values.shape[1] // columns)
        scales = np.exp2(rng.integers(-8, -2, grid)).astype(np.float32)
        if dtype != ml_dtypes.float8_e8m0fnu:
            scales *= rng.uniform(1, 2, grid).astype(np.float32)
        scales = scales.astype(dtype)
        one = block == (0, 0)
        stored[key + name] = scales.reshape([[], [1]][len(key) % 2]) if one else scales
        wide = np.repeat(np.repeat(scales.astype(np.float32), rows, 0), columns, 1)
        meant[key] = values.astype(np.float32) * wide[: values.shape[0], : values.shape[1]]
    return stored, meant


def write(
    folder: Path, weights: Weights, quantization: dict[str, Any], config: ModelConfig = BLOCKS
) -> None:
    """A folder whose config.json has this quantization_config, or none."""
    write_released(folder, config, FP8, weights=weights)
    tree = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    if not quantization:
        del tree["quantization_config"]
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("form", FORMS)
def test_fp8_of_other_makers_means_what_it_means_there(tmp_path: Path, form: str) -> None:
    quantization, block, name, dtype, held, says = FORMS[form]
    stored, meant = with_scales(weights_of(BLOCKS, FP8), block, name, dtype)
    extra = {f"{key.removesuffix('.weight')}.input_scale": np.ones(1, np.float32) for key in meant}
    extra = extra if quantization == STATIC else {}
    write(tmp_path / "hf", stored | extra, quantization)
    source = open_source(tmp_path / "hf")
    assert any(says in remark for remark in source.remarks), source.remarks
    assert any("scales of activations" in remark for remark in source.remarks) == bool(extra)
    assert {source.stored[key].dtype for key in meant} == {held}
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "wide", to="hf", dtype="float32")
    found = open_source(tmp_path / "wide")
    assert not found.remarks
    for key, value in meant.items():
        assert np.array_equal(found.stored[key].read(), value), key


@pytest.mark.parametrize("form", ["Qwen's", "a scale a tensor", "a scale a row"])
def test_they_are_loaded_as_they_are_converted(tmp_path: Path, form: str) -> None:
    quantization, block, name, dtype, held, _ = FORMS[form]
    stored, meant = with_scales(weights_of(BLOCKS_DENSE, FP8), block, name, dtype)
    write(tmp_path / "hf", stored, quantization, BLOCKS_DENSE)
    kept = {path: variable[...].dtype for path, variable in variables(load_files(tmp_path / "hf"))}
    assert kept["dense_layers.ffn.up.weight"] == (np.float32 if held == "F32" else "float8_e4m3fn")
    arrays = dict(variables(load_files(tmp_path / "hf", dtype=np.float32)))
    for tensor in tensors(BLOCKS_DENSE):
        if tensor.name in meant:
            array = np.asarray(arrays[tensor.path][...][tensor.index])
            assert np.array_equal(array.reshape(tensor.shape), meant[tensor.name]), tensor.name


def test_scales_are_still_checked(tmp_path: Path) -> None:
    quantization, block, name, dtype, *_ = FORMS["a scale a row"]
    stored, meant = with_scales(weights_of(BLOCKS, FP8), block, name, dtype)
    stored[next(iter(meant)) + name][3] = -1
    write(tmp_path / "hf", stored, quantization)
    with pytest.raises(UserError, match="a scale is no positive number"):
        convert(tmp_path / "hf", tmp_path / "out")
    stored, meant = with_scales(weights_of(BLOCKS, FP8), (128, 64), "_scale_inv", np.float32)
    write(tmp_path / "other", stored, OWN)  # not of the blocks that config.json names
    with pytest.raises(UserError, match="misshaped"):
        open_source(tmp_path / "other")


Q = DENSE_CONFIGS["qwen2"]
PACKED = np.ones((4, 4), np.int32)
BYTES = np.ones((64, 1), np.uint8)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True},
                     {"weight": BYTES, "weight.absmax": np.ones(4, np.float32)},
                     "bitsandbytes (4-bit)"),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True},
             {"weight": np.ones((48, 32), np.int8), "SCB": PACKED}, "bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, {"qweight": PACKED, "qzeros": PACKED},
             "gptq (4-bit)"),
    "awq": ({"quant_method": "awq", "bits": 4}, {"qweight": PACKED}, "awq (4-bit)"),
    "int4": ({"quant_method": "compressed-tensors", "format": "pack-quantized"},
             {"weight_packed": PACKED}, "compressed-tensors (pack-quantized)"),
    "w8a8": ({"quant_method": "compressed-tensors", "format": "int-quantized"},
             {"weight": np.ones((48, 32), np.int8)}, "compressed-tensors (int-quantized)"),
    "mxfp4": ({"quant_method": "mxfp4"}, {"weight_blocks": BYTES, "weight_scales": BYTES}, "mxfp4"),
    "hqq": ({"quant_method": "hqq"}, {"W_q": BYTES}, "hqq"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"},
              {"weight": BYTES, "weight_scale_2": np.ones(1, np.float32)}, "modelopt (NVFP4)"),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"},
                   {"weight": np.ones((48, 32), ml_dtypes.float8_e4m3fn),
                    "weight_scale": np.ones((48, 1), np.float32)}, "fbgemm_fp8"),
    "two lines": ({"quant_method": "a\nb"}, {"qweight": PACKED}, r"'a\nb'"),
    "a list": ({"quant_method": ["fp8"]}, {"qweight": PACKED}, "['fp8']"),
    "GPTQ without a config": ({}, {"qweight": PACKED}, "GPTQ or AWQ"),
    "bitsandbytes without one": ({}, {"weight": BYTES, "weight.absmax": BYTES}, "bitsandbytes (4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_other_quantized_formats_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    quantization, parts, says = REFUSED[kind]
    weights = weights_of(Q, "BF16")
    for name in [n for n in weights if n.endswith("_proj.weight") and ".mlp." in n]:
        del weights[name]
        weights |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    write(tmp_path / "hf", weights, quantization, Q)
    with pytest.raises(UserError) as error:
        open_source(tmp_path / "hf")
    assert f"weights are quantized as {says}" in str(error.value)
    assert "take the release in bfloat16" in str(error.value) and "\n" not in str(error.value)


def test_a_quantization_that_the_weights_are_not_in_is_passed_over(tmp_path: Path) -> None:
    for method in ("bitsandbytes", "fp8"):
        write_released(tmp_path / method, Q, "BF16", quantization_config={"quant_method": method})
        [remark] = open_source(tmp_path / method).remarks
        assert (
            remark == f"quantization_config says {method}, the weights are BF16: it is passed over"
        )
