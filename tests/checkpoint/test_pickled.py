"""Pickles are read only when that is asked for; what is read then, the parity tests say."""

import sys
from pathlib import Path

import pytest

from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.load import load
from dsjax.errors import UserError


@pytest.fixture
def folder(write_folder, weights) -> Path:
    folder: Path = write_folder(weights)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def test_a_folder_of_pickles_is_refused_with_what_to_do(folder, tmp_path):
    for attempt in (lambda: load(folder), lambda: convert(folder, tmp_path / "new")):
        with pytest.raises(UserError, match=r"a pickle is a program; .* --allow-pickle") as error:
            attempt()
        assert str(folder) in str(error.value)
    assert not (tmp_path / "new").exists()


def test_without_torch_it_is_said_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch: pip install 'dsjax\[pickle\]'"):
        convert(folder, tmp_path / "new", allow_pickle=True)


def test_safetensors_beside_pickles_are_what_is_read(write_folder, weights):
    folder = write_folder(weights)
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    load(folder)
