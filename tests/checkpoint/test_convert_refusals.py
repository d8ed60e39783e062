"""What cannot be converted is refused in one line, with exit code 2, and leaves nothing behind."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from released_folders import BLOCKS, Weights, assert_same, weights_of, write_released

from dsjax import cli
from dsjax.checkpoint.convert import convert

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says of it."""
    sys.argv = ["dsjax", "convert", *map(str, arguments)]
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture(autouse=True)
def arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    return tmp_path / "hf"


def spoiled(folder: Path, dtype: str, name: str, value: float) -> Path:
    weights = weights_of(BLOCKS, dtype)
    weights[name].flat[-1] = value
    write_released(folder, BLOCKS, dtype, weights=weights)
    return folder


@pytest.mark.parametrize("chosen", [[], ["--dtype", "float32"], ["--dtype", "fp8"]])
@pytest.mark.parametrize(
    ("dtype", "value"), [("F32", np.nan), ("BF16", np.inf), ("BF16", -np.nan), ("F16", -np.inf)]
)
def test_weights_that_are_not_finite(
    tmp_path: Path, capsys, dtype: str, value: float, chosen: list[str]
) -> None:
    folder = spoiled(tmp_path / "hf", dtype, UP, value)
    said = refused(capsys, folder, tmp_path / "out", *chosen)
    assert UP in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("chosen", [[], ["--dtype", "float32"]])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_in_fp8(tmp_path: Path, capsys, byte: int, chosen: list[str]) -> None:
    weights = weights_of(BLOCKS, "F8_E4M3")
    weights[UP].view(np.uint8).flat[5] = byte
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3", weights=weights)
    said = refused(capsys, tmp_path / "hf", tmp_path / "out", *chosen)
    assert f"{UP} holds NaN or infinity" in said


@pytest.mark.parametrize("chosen", [[], ["--dtype", "float32"]])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_scales_that_are_none(tmp_path: Path, capsys, value: float, chosen: list[str]) -> None:
    folder = spoiled(tmp_path / "hf", "F8_E4M3", f"{UP}_scale_inv", value)
    said = refused(capsys, folder, tmp_path / "out", *chosen)
    assert f"{UP}: the scale of block [2, 1] is" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_numbers_too_large_for_the_new_dtype(tmp_path: Path, capsys) -> None:
    folder = spoiled(tmp_path / "hf", "F32", NORM, 3.4e38)
    said = refused(capsys, folder, tmp_path / "out", "--dtype", "bfloat16")
    assert f"{NORM} holds NaN or infinity; a number is too large for BF16" in said


def test_a_destination_that_exists_or_has_no_place(source: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link", "hf"):
        assert "exists already" in refused(capsys, source, tmp_path / name)
    assert "lies inside the source" in refused(capsys, source, source / "out")
    assert "is no folder; make it" in refused(capsys, source, tmp_path / "no/out")
    assert "/proc/out.partial.jsonl: cannot be written" in refused(capsys, source, "/proc/out")


def test_options_that_are_none(source: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    said = refused(capsys, source, out, "--dtype", "int8")
    assert "--dtype int8: expected one of float32, bfloat16, fp8" in said
    assert "--to gguf: expected one of dsjax, hf" in refused(capsys, source, out, "--to", "gguf")
    assert "no such folder" in refused(capsys, tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "expected a Hugging Face folder, dsjax" in refused(capsys, tmp_path / "empty", out)
    assert "DST" in refused(capsys, source)


def test_a_disk_without_room(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    said = refused(capsys, source, tmp_path / "out")
    assert "1.0 kB free; make room" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_large_file_that_is_no_weight(source: Path, tmp_path: Path, capsys) -> None:
    (source / "data.zip").touch()
    os.truncate(source / "data.zip", 200_000_000)
    said = refused(capsys, source, tmp_path / "out")
    assert "data.zip: 200.0 MB, too large for a file that holds no weights" in said


def test_a_disk_that_becomes_full_keeps_what_is_finished(
    source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsjax.checkpoint import convert as verb

    def write(job, folder, stop, advance):
        if job.outputs[0].path.startswith("weights/norm"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(job, folder, stop, advance)

    original = verb.write_job
    with monkeypatch.context() as patch:
        patch.setattr(verb, "write_job", write)
        said = refused(capsys, source, tmp_path / "out")
    assert "No space left on device; the same command goes on from here" in said
    convert(source, tmp_path / "out", verify=True)


def _no_scale(weights: Weights) -> None:
    weights[NORM] = weights[NORM].astype(weights[UP].dtype)


def _integer_scale(weights: Weights) -> None:
    weights[f"{UP}_scale_inv"] = np.ones(weights[f"{UP}_scale_inv"].shape, np.int32)


def _integers(weights: Weights) -> None:
    weights[NORM] = weights[NORM].astype(np.int32)


def _missing(weights: Weights) -> None:
    del weights[NORM], weights[f"{UP}_scale_inv"]


def _two_ways(weights: Weights) -> None:
    name = "model.layers.1.input_layernorm.weight"
    weights[name] = weights[name].astype(np.float32)


def _other_repeat(weights: Weights) -> None:
    name = "model.layers.3.shared_head.head.weight"
    weights[name] = weights[name].copy()
    weights[name].view(np.uint16)[0, 0] ^= 1


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (_no_scale, f"{NORM} is F8_E4M3 and has no scales"),
        (_integer_scale, f"the scales of {UP} are I32, not F32"),
        (_integers, f"{NORM} is I32, expected one of BF16, F16, F32, F8_E4M3"),
        (_missing, "2 missing"),
        (_two_ways, "choose one by --dtype"),
        (_other_repeat, "differs from lm_head.weight"),
    ],
)
def test_tensors_that_are_not_the_models(
    tmp_path: Path, capsys, spoil: Callable[[Weights], None], found: str
) -> None:
    weights = weights_of(BLOCKS, "F8_E4M3")
    spoil(weights)
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3", weights=weights)
    assert found in refused(capsys, tmp_path / "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_all_problems_are_told_at_once(tmp_path: Path, capsys) -> None:
    weights = weights_of(BLOCKS, "F8_E4M3")
    for spoil in (_no_scale, _integer_scale, _two_ways):
        spoil(weights)
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3", weights=weights)
    said = refused(capsys, tmp_path / "hf", tmp_path / "out")
    for part in ("has no scales", "not F32", "choose one by --dtype"):
        assert part in said


@pytest.fixture
def ours(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "ours")
    return tmp_path / "ours"


def test_dsjax_weights_that_were_damaged(ours: Path, tmp_path: Path, capsys) -> None:
    chunk = ours / "weights/norm.weight/0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-1])
    assert f"has {len(data) - 1} bytes, expected {len(data)}" in refused(
        capsys, ours, tmp_path / "out"
    )
    chunk.unlink()
    assert "is missing" in refused(capsys, ours, tmp_path / "out")
    (chunk.parent / ".zarray").unlink()
    assert "1 missing (model.norm.weight)" in refused(capsys, ours, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"compressor": {"id": "zstd"}},
        {"dtype": "<i4"},
        {"order": "F"},
        {"shape": [160, 1]},
        {"shape": "160"},
        {"shape": [-160]},
        {"chunks": [0]},
        {"chunks": [150]},
        {"chunks": []},
        {"chunks": [True]},
    ],
)
def test_arrays_of_another_layout(ours: Path, tmp_path: Path, capsys, change: dict) -> None:
    file = ours / "weights/norm.weight/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert "not an array as `dsjax convert`" in refused(capsys, ours, tmp_path / "out")


def test_an_array_of_another_shape(ours: Path, tmp_path: Path, capsys) -> None:
    file = ours / "weights/norm.weight/.zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [80], "chunks": [80]}))
    (file.parent / "0").write_bytes(bytes(160))
    assert "model.norm.weight is [80], expected [160]" in refused(capsys, ours, tmp_path / "out")


def test_verification_sees_a_bit_that_changed(
    source: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsjax.checkpoint import convert as verb

    def write(job, folder, stop, advance):
        digests = original(job, folder, stop, advance)
        file = folder / job.outputs[0].path
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return digests

    original = verb.write_job
    monkeypatch.setattr(verb, "write_job", write)
    said = refused(capsys, source, tmp_path / "out", "--to", "hf", "--verify")
    assert "differs from the source within" in said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_changed_bit_is_found_later_by_inspect(ours: Path, capsys) -> None:
    file = ours / "weights/head.weight/0.0"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    sys.argv = ["dsjax", "inspect", "--verify", str(ours)]
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "weights/head.weight/0.0 does not have the digest" in capsys.readouterr().err


def test_links_to_shards_are_followed(source: Path, tmp_path: Path) -> None:
    """A hub's cache is a folder of links."""
    (tmp_path / "links").mkdir()
    for file in source.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    convert(tmp_path / "links", tmp_path / "out", to="hf")
    assert_same(tmp_path / "out", weights_of(BLOCKS, "BF16"))
