"""FP8 folders and converted ones load as what their numbers mean, on one device and on many."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from released_folders import BLOCKS, FAMILIES, write_released

import dsjax
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.checkpoint.from_files import load_files
from dsjax.errors import UserError
from dsjax.model.layers import variables
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import Layout
from tests.numerics.definition import BLOCKS as SIDES
from tests.numerics.definition import dequantize


def held(model: Transformer) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in variables(model)}


def assert_equal(model: Transformer, other: Transformer) -> None:
    one, two = held(model), held(other)
    assert one.keys() == two.keys()
    for path, array in one.items():
        assert array.dtype == two[path].dtype, path
        assert array.tobytes() == two[path].tobytes(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_fp8_is_widened_to_what_its_definition_says(tmp_path: Path, dtype: str | None) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    model = dsjax.load(tmp_path / "hf", dtype=dtype)
    expected = jnp.dtype(dtype or "bfloat16")
    assert model.dtype == expected
    arrays = held(model)
    for tensor in tensors(BLOCKS):
        if tensor.repeats:
            continue
        value = weights[tensor.name].astype(np.float32)
        if tensor.scale:
            raw = weights[tensor.name].view(np.uint8)
            value = dequantize(raw, weights[tensor.scale[0]], SIDES)
        value = value if tensor.kind == ROUTER_BIAS else value.astype(expected)
        found = arrays[tensor.path][tensor.index]
        assert found.dtype == value.dtype
        assert found.tobytes() == value.tobytes(), tensor.name


def test_widening_unasked_is_said_in_one_line(tmp_path: Path, capsys) -> None:
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    load_files(tmp_path / "hf")
    assert capsys.readouterr().err == f"{tmp_path}/hf: FP8 weights are widened to bfloat16\n"
    load_files(tmp_path / "hf", dtype="bfloat16")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("hf", {"data": 2, "fsdp": 4}),
        ("hf", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("ours", {"fsdp": 2, "tensor": 4}),
    ],
)
def test_slices_that_begin_within_a_block_are_widened_alike(
    tmp_path: Path, form: str, sizes: dict[str, int]
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    convert(tmp_path / "hf", tmp_path / "ours")
    whole = load_files(tmp_path / "hf", dtype="float32")
    cut = load_files(tmp_path / form, "float32", Layout(make_mesh(sizes)))
    assert_equal(cut, whole)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("family", ["v3", "v2_lite", "llama3_tied", "qwen2"])
def test_a_converted_folder_loads_like_the_one_it_was_made_of(
    tmp_path: Path, family: str, dtype: str
) -> None:
    write_released(tmp_path / "hf", FAMILIES[family], dtype)
    convert(tmp_path / "hf", tmp_path / "ours")
    assert_equal(dsjax.load(tmp_path / "ours"), dsjax.load(tmp_path / "hf"))


@pytest.mark.parametrize("bad", [np.nan, 0.0, -1.0, np.inf])
def test_a_scale_that_is_none_is_named(tmp_path: Path, bad: float) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights[f"{name}_scale_inv"][-1, -1] = bad
    write_released(tmp_path / "bad", BLOCKS, "F8_E4M3", weights=weights)
    with pytest.raises(UserError, match=f"{name}: the scale of block .* expected a positive"):
        load_files(tmp_path / "bad")
