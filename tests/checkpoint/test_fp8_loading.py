"""FP8 folders load as FP8 or as what it means, on one device and on many, and are saved again."""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from released_folders import BLOCKS, BLOCKS_DENSE, FAMILIES, assert_same, write_released

import dsjax
from dsjax.architecture import ModelConfig
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.checkpoint.from_files import load_files
from dsjax.errors import UserError
from dsjax.model.layers import BlockScale, count_parameters, variables
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


@pytest.mark.parametrize("config", [BLOCKS, BLOCKS_DENSE], ids=["v3", "qwen3"])
def test_fp8_is_held_bit_by_bit_in_the_bytes_of_the_files(
    tmp_path: Path, config: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_released(tmp_path / "hf", config, "F8_E4M3")
    model = load_files(tmp_path / "hf")
    assert capsys.readouterr().err == ""
    assert model.dtype == jnp.bfloat16
    arrays = held(model)
    own = [tensor for tensor in tensors(config) if not tensor.repeats]
    for tensor in own:
        stored = {tensor.path: weights[tensor.name]}
        if tensor.scale:
            stored[f"{tensor.path}_scale"] = weights[tensor.scale[0]]
        for path, value in stored.items():
            found = arrays[path][tensor.index]
            assert found.dtype == value.dtype, path
            assert found.tobytes() == value.tobytes(), path
    repeated = sum(weights[t.name].nbytes for t in tensors(config) if t.repeats)
    in_files = sum(weight.nbytes for weight in weights.values()) - repeated
    assert sum(array.nbytes for array in arrays.values()) == in_files
    assert count_parameters(model) == sum(tensor.size for tensor in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_is_widened_to_what_its_definition_says(tmp_path: Path, dtype: str) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    model = dsjax.load(tmp_path / "hf", dtype=dtype)
    expected = jnp.dtype(dtype)
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


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("hf", {"data": 2, "fsdp": 4}),
        ("hf", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("ours", {"fsdp": 2, "tensor": 4}),
    ],
)
def test_slices_that_begin_within_a_block_are_held_and_widened_alike(
    tmp_path: Path, form: str, sizes: dict[str, int], dtype: str | None
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    convert(tmp_path / "hf", tmp_path / "ours")
    whole = load_files(tmp_path / "hf", dtype)
    cut = load_files(tmp_path / form, dtype, Layout(make_mesh(sizes)))
    assert_equal(cut, whole)
    for path, variable in variables(cut):
        if isinstance(variable, BlockScale):
            experts = sizes.get("expert", 1) if ".experts." in path else 1
            part = variable[...].addressable_shards[0].data
            assert part.size == variable[...].size // experts, path


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


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name].view(np.uint8)[-1, -1] = 0xFF
    write_released(tmp_path / "bad", BLOCKS, "F8_E4M3", weights=weights)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity; fetch it again"):
        load_files(tmp_path / "bad")


def test_layers_that_are_fp8_only_in_part_want_a_dtype(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    name = "model.layers.1.self_attn.o_proj.weight"
    del weights[f"{name}_scale_inv"]
    weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    write_released(tmp_path / "part", BLOCKS, "F8_E4M3", weights=weights)
    with pytest.raises(UserError, match=rf"two ways: {name} as BF16 and .* as F8_E4M3; choose"):
        load_files(tmp_path / "part")
    assert load_files(tmp_path / "part", dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("form", ["hf", "dsjax"])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_fp8_is_saved_bit_by_bit(tmp_path: Path, form: str, sizes: dict[str, int] | None) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    model = dsjax.load(tmp_path / "hf", mesh=make_mesh(sizes) if sizes else None)
    dsjax.save(model, tmp_path / "saved", format=form)
    assert_equal(dsjax.load(tmp_path / "saved"), model)
    if form == "hf":
        assert_same(tmp_path / "saved", weights)
