"""Without --allow-pickle, or without torch, no pickle is opened; what is said tells what to do."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
from released_folders import FAMILIES, assert_same, write_released

import dsjax
from dsjax import cli
from dsjax.checkpoint.convert import convert
from dsjax.errors import UserError


class Trap:
    """What a reader that runs what it is told would notice."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return (open, (str(self.file), "w"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released folder whose weights are a pickle that would run code, in a name with a blank."""
    folder = tmp_path / "a model"
    write_released(folder, FAMILIES["qwen2"], "F32")
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap(tmp_path / "ran")}))
    return folder


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path):
    yield
    assert not (tmp_path / "ran").exists()


def test_the_trap_works(folder: Path, tmp_path: Path) -> None:
    pickle.loads((folder / "pytorch_model.bin").read_bytes())["a"].close()
    (tmp_path / "ran").unlink()


@pytest.mark.parametrize("verb", ["convert", "inspect"])
def test_without_the_flag_it_is_refused(
    folder: Path, tmp_path: Path, verb: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(folder), *[str(tmp_path / "out")] * (verb == "convert")]
    monkeypatch.setattr(sys, "argv", ["dsjax", verb, *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "a format that can carry code" in said
    assert f"dsjax convert '{folder}' NEW_FOLDER --allow-pickle" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a model"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_loading_says_to_convert_first(folder: Path, name: str) -> None:
    (folder / "pytorch_model.bin").rename(folder / name)
    with pytest.raises(UserError, match=f"{name}: weights in a pickle.*--allow-pickle$"):
        dsjax.load(folder)


def test_an_index_of_pickles_is_refused_too(folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(UserError, match=r"bin\.index\.json: weights in a pickle"):
        dsjax.load(folder)


def test_without_torch_it_says_how_to_get_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch: pip install 'dsjax\[pickle\]'"):
        convert(folder, tmp_path / "out", allow_pickle=True)


def test_several_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(
        UserError, match=r"has pytorch_model\.bin, pytorch_model\.bin\.index\.json;"
    ):
        convert(folder, tmp_path / "out", allow_pickle=True)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).rename(folder / name.replace("bin", "pt").replace(".index.json", ".pth"))
    with pytest.raises(UserError, match=r"has pytorch_model\.pt, pytorch_model\.pt\.pth; expected"):
        convert(folder, tmp_path / "out", allow_pickle=True)


def test_safetensors_are_taken_before_pickles(folder: Path, tmp_path: Path) -> None:
    weights = write_released(tmp_path / "other", FAMILIES["qwen2"], "F32")
    shutil.copy(folder / "pytorch_model.bin", tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "out", to="hf", allow_pickle=True)
    assert_same(tmp_path / "out", weights)
    assert not (tmp_path / "out/pytorch_model.bin").exists()
