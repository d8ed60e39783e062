"""What PyTorch saved, converted: bit by bit what safetensors of the same weights become."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsjax.checkpoint.convert import convert
from dsjax.errors import UserError

from .models import CASES, SEEDS, make_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A small llama, its head tied, as safetensors in `folder`; and its weights."""
    kind, make = CASES["llama3"]
    model = make_model(kind, make(), SEEDS.get("llama3", 0)).to(dtype)
    assert model.config.tie_word_embeddings
    model.save_pretrained(folder)
    return {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}


def _files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def pickled(folder: Path, like: Path) -> Path:
    """A folder with the same config, and no weights yet."""
    folder.mkdir()
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    if (file := like / "generation_config.json").is_file():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["bin", "shards", "pth", "state_dict"])
def test_pickles_become_what_safetensors_become(tmp_path: Path, dtype: str, form: str) -> None:
    weights = saved(tmp_path / "hf", DTYPES[dtype])
    folder = pickled(tmp_path / "old", tmp_path / "hf")
    if form == "shards":
        names = sorted(weights)
        homes = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for home in set(homes.values()):
            torch.save({n: weights[n] for n in names if homes[n] == home}, folder / home)
        index = json.dumps({"weight_map": homes})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        table = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        tree = {"state_dict": table, "step": 5} if form == "state_dict" else table
        torch.save(tree, folder / ("model.pth" if form == "pth" else "pytorch_model.bin"))
    for to in ("dsjax", "hf"):
        convert(tmp_path / "hf", tmp_path / f"expected-{to}", to=to)
        convert(folder, tmp_path / f"found-{to}", to=to, allow_pickle=True, verify=True)
        assert _files(tmp_path / f"found-{to}") == _files(tmp_path / f"expected-{to}")


class Runs:
    """What a pickle of ours would do if it were allowed to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def _halve(file: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, file)
    os.truncate(file, file.stat().st_size // 2)


def _old(file: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, file, _use_new_zipfile_serialization=False)


def _with(value: Any) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    return lambda file, weights: torch.save(weights | {"x": value}, file)


def _program(file: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights | {"x": Runs(file.with_name("ran"))}, file)


SPOILED: dict[str, tuple[str, Callable[[Path, dict[str, torch.Tensor]], Any]]] = {
    "a program": ("weights-only loader", _program),
    "half of it": ("weights-only loader", _halve),
    "the format before 1.6": ("weights-only loader", _old),
    "no pickle": ("weights-only loader", lambda file, _: file.write_bytes(b"no pickle")),
    "a list": ("holds list", lambda file, weights: torch.save(list(weights.values()), file)),
    "a number": ("is int; expected a tensor", _with(5)),
    "integers": ("torch.int64; expected", _with(torch.ones(2, dtype=torch.int64))),
    "columns": ("row by row", _with(torch.ones(2, 3).T)),
    "one too many": ("1 unknown (x)", _with(torch.ones(2))),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_no_dictionary_of_tensors_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    said, spoil = SPOILED[kind]
    weights = saved(tmp_path / "hf")
    folder = pickled(tmp_path / "old", tmp_path / "hf")
    spoil(folder / "pytorch_model.bin", weights)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "new", allow_pickle=True)
    assert said in str(error.value) and str(error.value).isprintable()
    assert not (folder / "ran").exists() and not (tmp_path / "new").exists()
