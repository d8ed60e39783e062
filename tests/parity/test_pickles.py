"""Files that torch writes: converted bit by bit where they are sound, else refused."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from dsjax import cli
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.inspect import report
from tests.checkpoint.released_folders import (
    BLOCKS,
    FAMILIES,
    Weights,
    assert_same,
    tree_of,
    weights_of,
    write_released,
)

NAME = "pytorch_model.bin"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"

CASES = [("v3", "F32"), ("v2", "BF16"), ("kimi_k2", "F16"), ("llama3_tied", "BF16")]


def to_torch(weight: np.ndarray) -> torch.Tensor:
    """The same bits."""
    kinds = {
        np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
        np.dtype(ml_dtypes.float8_e4m3fn): (np.int8, torch.float8_e4m3fn),
    }
    if weight.dtype not in kinds:
        return torch.from_numpy(weight.copy())
    plain, kind = kinds[weight.dtype]
    return torch.from_numpy(weight.view(plain).copy()).view(kind)


def to_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: to_torch(weight) for name, weight in weights.items()}


def write(folder: Path, config: Any, dtype: str, save: Callable[[Path, Any], None]) -> Weights:
    """A released folder whose weights torch saves."""
    weights = write_released(folder, config, dtype)
    for file in folder.glob("model*"):
        file.unlink()
    save(folder, to_tensors(weights))
    return weights


def whole(folder: Path, tensors: Any) -> None:
    torch.save(tensors, folder / NAME)


def nested(folder: Path, tensors: Any) -> None:
    torch.save({"state_dict": tensors}, folder / "model.pt")


def sharded(folder: Path, tensors: Any) -> None:
    weight_map = {}
    for i in range(3):
        shard = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def one_storage(folder: Path, tensors: Any) -> None:
    """All tensors of a dtype are views of one; and a Parameter is a tensor too."""
    views = {}
    for kind in {tensor.dtype for tensor in tensors.values()}:
        mine = {name: tensor for name, tensor in tensors.items() if tensor.dtype == kind}
        flat = torch.cat([tensor.reshape(-1) for tensor in mine.values()])
        parts = flat.split([tensor.numel() for tensor in mine.values()])
        views |= {n: p.view(t.shape) for (n, t), p in zip(mine.items(), parts, strict=True)}
    views[NORM] = torch.nn.Parameter(views[NORM])
    torch.save(views, folder / "model.pth")


@pytest.mark.parametrize("save", [whole, nested, sharded, one_storage])
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_they_become_what_safetensors_of_the_same_weights_become(
    tmp_path: Path, family: str, dtype: str, save: Callable[[Path, Any], None]
) -> None:
    config = FAMILIES[family]
    weights = write(tmp_path / "bin", config, dtype, save)
    write_released(tmp_path / "hf", config, dtype, weights=weights)
    convert(tmp_path / "bin", tmp_path / "from_bin", allow_pickle=True, verify=True)
    convert(tmp_path / "hf", tmp_path / "from_hf")
    assert tree_of(tmp_path / "from_bin") == tree_of(tmp_path / "from_hf")
    convert(tmp_path / "from_bin", tmp_path / "back")
    assert_same(tmp_path / "back", weights)
    assert not [*tmp_path.rglob("back/*.bin*"), *tmp_path.rglob("back/*.pt*")]


def test_fp8_keeps_its_bits_and_scales(tmp_path: Path) -> None:
    weights = write(tmp_path / "bin", BLOCKS, "F8_E4M3", sharded)
    convert(tmp_path / "bin", tmp_path / "out", to="hf", allow_pickle=True)
    assert_same(tmp_path / "out", weights)


def test_inspect_looks_into_them_too(tmp_path: Path) -> None:
    weights = write(tmp_path / "bin", FAMILIES["v3"], "BF16", sharded)
    stored = report(str(tmp_path / "bin"), allow_pickle=True)["stored"]
    assert (stored["files"], stored["tensors"]) == (3, len(weights))


def test_a_tied_head_and_rotary_frequencies_are_left_out(tmp_path: Path) -> None:
    config = FAMILIES["llama3_tied"]

    def save(folder: Path, tensors: Any) -> None:
        tied = tensors["model.embed_tokens.weight"]
        frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
        torch.save(tensors | {HEAD: tied} | frequencies, folder / NAME)

    weights = write(tmp_path / "bin", config, "F32", save)
    convert(tmp_path / "bin", tmp_path / "out", to="hf", allow_pickle=True)
    assert_same(tmp_path / "out", weights)


def test_a_tied_models_head_of_its_own_is_left_out_with_a_word(tmp_path: Path, capsys) -> None:
    def save(folder: Path, tensors: Any) -> None:
        torch.save(tensors | {HEAD: tensors["model.embed_tokens.weight"] + 1}, folder / NAME)

    weights = write(tmp_path / "bin", FAMILIES["llama3_tied"], "F32", save)
    convert(tmp_path / "bin", tmp_path / "out", to="hf", allow_pickle=True)
    assert_same(tmp_path / "out", weights)
    assert f"{HEAD} is passed over" in (said := capsys.readouterr().err) and "DIFFERS" in said


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], place: Path) -> str:
    """What the command says of `place / "bin"`; nothing is left, and nothing was run."""
    sys.argv = ["dsjax", "convert", str(place / "bin"), str(place / "out"), "--allow-pickle"]
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == ["bin"]
    return said


@pytest.fixture(autouse=True)
def arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


class Trap:
    """Makes a file beside the folder when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("where", ["value", "key", "beside"])
@pytest.mark.parametrize("call", ["system", "mkdir", "eval"])
def test_code_is_refused_and_not_run(tmp_path: Path, capsys, call: str, where: str) -> None:
    ran = tmp_path / "ran"
    traps = {
        "system": Trap(os.system, f"touch {ran}"),
        "mkdir": Trap(os.mkdir, str(ran)),
        "eval": Trap(eval, f"__import__('os').mkdir({str(ran)!r})"),
    }

    def save(folder: Path, tensors: Any) -> None:
        trap = traps[call]
        trees = {
            "value": tensors | {NORM: trap},
            "key": tensors | {trap: tensors[NORM]},
            "beside": {"state_dict": tensors, "optimizer": trap},
        }
        torch.save(trees[where], folder / NAME)

    write(tmp_path / "bin", FAMILIES["qwen2"], "F32", save)
    said = refused(capsys, tmp_path)
    assert f"{NAME}: asks for " in said and "nothing was run" in said
    torch.load(tmp_path / "bin" / NAME, weights_only=False)  # that would have:
    assert ran.exists()


def changed(folder: Path, change: Callable[[str, bytes], bytes | None], **how: Any) -> None:
    """The archive written anew, each of its members changed."""
    with zipfile.ZipFile(folder / NAME) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / NAME, "w", **how) as archive:
        for name, data in members.items():
            if (new := change(name, data)) is not None:
                archive.writestr(name, new)


def _cut(part: float) -> Callable[[Path, Any], None]:
    def save(folder: Path, tensors: Any) -> None:
        whole(folder, tensors)
        size = (folder / NAME).stat().st_size
        os.truncate(folder / NAME, int(size * part))

    return save


def _shrunk(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    changed(folder, lambda name, data: data[:8] if name.endswith("/data/0") else data)


def _gone(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    changed(folder, lambda name, data: None if name.endswith("/data/3") else data)


def _more(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    with zipfile.ZipFile(folder / NAME, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/data/999", b"nobody's")


def _twice(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    with zipfile.ZipFile(folder / NAME, "a") as archive, pytest.warns(UserWarning):
        name = next(name for name in archive.namelist() if name.endswith("/data/0"))
        archive.writestr(name, archive.read(name))


def _compressed(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    changed(folder, lambda name, data: data, compression=zipfile.ZIP_DEFLATED)


def _big_endian(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    changed(folder, lambda name, data: b"big" if name.endswith("/byteorder") else data)


def _bad_pickle(folder: Path, tensors: Any) -> None:
    whole(folder, tensors)
    changed(folder, lambda name, data: data[:-40] if name.endswith("data.pkl") else data)


def _legacy(folder: Path, tensors: Any) -> None:
    torch.save(tensors, folder / NAME, _use_new_zipfile_serialization=False)


def _plain_pickle(folder: Path, tensors: Any) -> None:
    (folder / NAME).write_bytes(pickle.dumps({"a": 1}))


def _saving(make: Callable[[Any], Any]) -> Callable[[Path, Any], None]:
    return lambda folder, tensors: torch.save(make(tensors), folder / NAME)


def _lying_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path, Any], None]:
    def save(folder: Path, tensors: Any) -> None:
        sharded(folder, tensors)
        index = folder / f"{NAME}.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        index.write_text(json.dumps({"weight_map": change(weight_map)}))

    return save


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (_cut(0.99), "truncated or damaged: File is not a zip file; fetch it again"),
        (_cut(0.5), "truncated or damaged: File is not a zip file; fetch it again"),
        (_cut(0), "no archive as PyTorch writes it since 1.6"),
        (_shrunk, "damaged: its archive holds "),
        (_gone, "cannot be read by torch: "),
        (_more, "damaged: its archive holds "),
        (_twice, "damaged: its archive holds "),
        (_compressed, "is compressed; torch.save it again"),
        (_big_endian, "its numbers are not little-endian"),
        (_bad_pickle, "fetch it again"),
        (_legacy, "no archive as PyTorch writes it since 1.6; load it there, and torch.save it"),
        (_plain_pickle, "no archive as PyTorch writes it since 1.6"),
        (_saving(lambda t: list(t.values())), "holds a list; expected tensors by name"),
        (_saving(lambda t: {"state_dict": [1]}), "holds a list; expected tensors by name"),
        (_saving(lambda t: {"state_dict": t, "epoch": 3}), "'state_dict' is a dict; expected"),
        (_saving(lambda t: t | {"step": 3}), "'step' is a int; expected tensors alone"),
        (_saving(lambda t: t | {7: t[NORM]}), "7: a tensor's name is printable text"),
        (_saving(lambda t: t | {"a\nb": t[NORM]}), r"'a\nb': a tensor's name is printable text"),
        (_saving(lambda t: t | {UP: t[UP].t().contiguous().t()}), f"{UP} is no plain tensor"),
        (_saving(lambda t: t | {UP: t[UP].to_sparse()}), f"{UP} is no plain tensor"),
        (_saving(lambda t: t | {UP: t[UP].to("meta")}), f"{UP} is no plain tensor"),
        (_saving(lambda t: t | {UP: t[UP].to(torch.complex64)}), f"{UP} is no plain tensor"),
        (_saving(lambda t: t | {UP: t[UP].int()}), f"{UP} is I32, expected one of"),
        (_saving(lambda t: t | {UP: t[UP][1:]}), "1 misshaped"),
        (_saving(lambda t: t | {UP: t[UP] * torch.nan}), f"{UP} holds NaN or infinity"),
        (_saving(lambda t: {n: v for n, v in t.items() if n != UP}), f"1 missing ({UP})"),
        (_lying_index(lambda m: m | {"x": m[UP]}), "holds x, but it does not"),
        (_lying_index(lambda m: {n: f for n, f in m.items() if n != UP}), f"holds {UP}, but"),
        (_lying_index(lambda m: m | {UP: "../bin"}), "is the name of a file in this folder"),
        (_lying_index(lambda m: m | {UP: "pytorch_model-4.bin"}), "truncated or damaged: "),
    ],
)
def test_what_is_no_file_of_plain_tensors_is_refused(
    tmp_path: Path, capsys, save: Callable[[Path, Any], None], expected: str
) -> None:
    write(tmp_path / "bin", FAMILIES["qwen2"], "F32", save)
    said = refused(capsys, tmp_path)
    assert expected in said, said
    assert str(tmp_path / "bin") in said


def test_any_damaged_byte_of_a_header_changes_no_weight_unseen(tmp_path: Path) -> None:
    """Numbers apart, a file with a changed byte is refused or read as it was."""
    from dsjax.checkpoint.pickled import read_pickle
    from dsjax.errors import UserError

    tensors = to_tensors(weights_of(FAMILIES["qwen2"], "F32"))
    file = tmp_path / NAME
    torch.save({name: tensors[name] for name in (NORM, HEAD)}, file)
    sound, entries = file.read_bytes(), read_pickle(file)
    expected = {name: entry.read().tobytes() for name, entry in entries.items()}
    numbers = [range(entry.start, entry.start + entry.nbytes) for entry in entries.values()]
    places = [i for i in range(len(sound)) if not any(i in part for part in numbers)]
    rng, refusals = np.random.default_rng(0), 0
    for place in rng.choice(places, 300, replace=False):
        data = bytearray(sound)
        data[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        try:
            found = {name: entry.read().tobytes() for name, entry in read_pickle(file).items()}
        except UserError:
            refusals += 1
        else:
            assert list(found.values()) == list(expected.values()), place
    assert refusals > 50
