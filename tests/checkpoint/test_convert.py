"""Every family and dtype, there and back, bit by bit; and FP8 to what it means."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from released_folders import (
    BLOCKS,
    BLOCKS_DENSE,
    CARRIED,
    FAMILIES,
    assert_same,
    tree_of,
    weights_of,
    write_released,
)

from dsjax.architecture import ModelConfig
from dsjax.checkpoint import conversion, streams, weights_folder
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.families import FP8, ROUTER_BIAS, tensors
from dsjax.checkpoint.inspect import inspect, report
from dsjax.checkpoint.safetensors import DTYPES, read_folder
from tests.numerics.definition import BLOCKS as SIDES
from tests.numerics.definition import dequantize, quantize, to_bfloat16


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, chunks and slabs even of what is small."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(weights_folder, "CHUNK_BYTES", 150_000)
    monkeypatch.setattr(streams, "SLAB", 10_000)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", FP8])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_dsjax_to_hf_gives_every_bit_back(tmp_path: Path, family: str, dtype: str) -> None:
    weights = write_released(tmp_path / "hf", FAMILIES[family], dtype)
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", weights)
    for name in (*CARRIED, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16", FP8])
@pytest.mark.parametrize("config", [BLOCKS, BLOCKS_DENSE], ids=["v3", "qwen3"])
def test_many_shards_chunks_and_slabs_change_nothing(
    tmp_path: Path, config: ModelConfig, dtype: str, pieces: None
) -> None:
    weights = write_released(tmp_path / "hf", config, dtype, shards=5)
    convert(tmp_path / "hf", tmp_path / "ours", verify=True)
    convert(tmp_path / "ours", tmp_path / "again", to="dsjax", verify=True)
    assert tree_of(tmp_path / "again") == tree_of(tmp_path / "ours")
    convert(tmp_path / "again", tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", weights)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    convert(tmp_path / "hf", tmp_path / "straight", to="hf", verify=True)
    assert tree_of(tmp_path / "straight") == tree_of(tmp_path / "back")


def test_mtp_is_kept_once_by_us_and_repeated_in_released_files(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, FP8)
    convert(tmp_path / "hf", tmp_path / "ours")
    arrays = {path.parent.name for path in (tmp_path / "ours/weights").glob("*/.zarray")}
    assert "mtp.block.ffn.experts.up_scale_inv" in arrays
    assert not [name for name in arrays if name.startswith(("mtp.embed", "mtp.head"))]
    convert(tmp_path / "ours", tmp_path / "back")
    name = "model.layers.3.embed_tokens.weight"
    again = read_folder(tmp_path / "back")[name].read()
    assert again.tobytes() == weights["model.embed_tokens.weight"].tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("to", ["hf", "dsjax"])
def test_fp8_widens_to_what_its_definition_says(
    tmp_path: Path, to: str, dtype: str, pieces: None
) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, FP8)
    convert(tmp_path / "hf", tmp_path / "wide", to=to, dtype=dtype, verify=True)
    folder = tmp_path / "wide"
    if to == "dsjax":
        convert(folder, tmp_path / "back")
        folder = tmp_path / "back"
    expected = {}
    for tensor in tensors(BLOCKS):
        value = weights[tensor.name]
        if tensor.scale:
            value = dequantize(value.view(np.uint8), weights[tensor.scale[0]], SIDES)
            value = to_bfloat16(value) if dtype == "bfloat16" else value
        elif tensor.kind != ROUTER_BIAS:
            value = value.astype(DTYPES[conversion.DTYPE_NAMES[dtype]])
        expected[tensor.name] = value
    assert_same(folder, expected)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert "quantization_config" not in config


def test_fp8_is_made_of_exactly_what_the_release_has_in_fp8(tmp_path: Path, pieces: None) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F32")
    convert(tmp_path / "hf", tmp_path / "fp8", to="hf", dtype="fp8", verify=True)
    stored = read_folder(tmp_path / "fp8")
    released = weights_of(BLOCKS, FP8)
    assert {n: e.dtype for n, e in stored.items()} == {
        name: next(d for d, kind in DTYPES.items() if kind == weight.dtype)
        for name, weight in released.items()
    }
    for tensor in tensors(BLOCKS):
        if tensor.scale:
            values, scales = quantize(weights[tensor.name], SIDES)
            assert np.array_equal(stored[tensor.name].read().view(np.uint8), values)
            assert np.array_equal(stored[tensor.scale[0]].read(), scales)
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["torch_dtype"] == "bfloat16"


def test_fp8_that_stays_fp8_is_carried(tmp_path: Path) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, FP8)
    convert(tmp_path / "hf", tmp_path / "same", to="hf", dtype="fp8")
    assert_same(tmp_path / "same", weights)


def test_a_folder_without_mtp_tensors_stays_without(tmp_path: Path, capsys) -> None:
    config = BLOCKS.model_copy(update={"num_nextn_predict_layers": 0})
    weights = write_released(tmp_path / "hf", config, "BF16", num_nextn_predict_layers=1)
    convert(tmp_path / "hf", tmp_path / "ours")
    said = f"{tmp_path}/hf: config.json promises MTP layers, but the files hold none\n"
    assert capsys.readouterr().err == said
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same(tmp_path / "back", weights)
    found = json.loads((tmp_path / "back/config.json").read_text())
    assert found["num_nextn_predict_layers"] == 0  # what is there, not what was promised


@pytest.mark.parametrize("dtype", ["BF16", FP8])
def test_orbax_itself_restores_what_was_written(tmp_path: Path, dtype: str, pieces: None) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, dtype)
    convert(tmp_path / "hf", tmp_path / "ours")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as orbax:
        restored = orbax.restore((tmp_path / "ours/weights").absolute())
    for tensor in tensors(BLOCKS):
        if tensor.repeats:
            continue
        array = np.asarray(restored[tensor.path][tensor.index])
        assert array.dtype == weights[tensor.name].dtype
        assert array.shape == tensor.inner
        assert array.tobytes() == weights[tensor.name].tobytes()
        if dtype == FP8 and tensor.scale:
            scales = restored[f"{tensor.path}_scale_inv"][tensor.index]
            assert np.array_equal(scales, weights[tensor.scale[0]])


def test_orbax_restores_it_on_a_mesh(tmp_path: Path, pieces: None) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, FP8)
    convert(tmp_path / "hf", tmp_path / "ours")
    mesh = jax.make_mesh((8,), ("expert",), (jax.sharding.AxisType.Auto,))
    routed = jax.NamedSharding(mesh, jax.P(None, "expert"))
    whole = jax.NamedSharding(mesh, jax.P())
    shapes = report_arrays(tmp_path / "ours")
    wanted = {
        name: jax.ShapeDtypeStruct(
            leaf["shape"],
            DTYPES[leaf["dtype"]],
            sharding=routed if ".experts." in name else whole,
        )
        for name, leaf in shapes.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as orbax:
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=how)
        restored = orbax.restore((tmp_path / "ours/weights").absolute(), args=arguments)
    array = restored["moe_layers.ffn.experts.gate"]
    assert array.sharding == routed
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    assert np.asarray(array[1, 3]).tobytes() == weights[name].tobytes()
    scales = restored["moe_layers.ffn.experts.gate_scale_inv"][1, 3]
    assert np.array_equal(scales, weights[f"{name}_scale_inv"])


def report_arrays(folder: Path) -> dict[str, dict]:
    """Shape and dtype of every array, from the manifest."""
    return json.loads((folder / "manifest.json").read_text())["leaves"]


def test_inspect_says_the_same_of_both_forms_and_checks_them(tmp_path: Path, capsys) -> None:
    write_released(tmp_path / "hf", BLOCKS, FP8)
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    ours, theirs = report(str(tmp_path / "ours")), report(str(tmp_path / "hf"))
    for key in ("family", "config", "parameters", "bytes", "mtp_layers"):
        assert ours[key] == theirs[key]
    for folder in ("ours", "back"):
        capsys.readouterr()
        inspect(str(tmp_path / folder), as_json=True, verify=True)
        checked = json.loads(capsys.readouterr().out)["verified"]
        assert checked["files"] == len(tree_of(tmp_path / folder))
    inspect(str(tmp_path / "ours"), as_json=False, verify=True)
    assert "verified: " in capsys.readouterr().out
