"""The manifest notices every change to the files it lists, and to itself."""

import json
import random
from pathlib import Path

import pytest

from dsjax.checkpoint.manifest import MANIFEST, DamagedError, verify, write_manifest

LEAVES = {"w": {"shape": [2, 3], "dtype": "float32"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "data").write_bytes(random.Random(0).randbytes(16))
    (tmp_path / "state" / "empty").touch()
    (tmp_path / "extra.json").write_text("{}")
    write_manifest(tmp_path, 7, LEAVES)
    return tmp_path


def test_an_untouched_folder_gives_its_leaves_back(folder: Path):
    assert verify(folder, 7) == LEAVES


def test_the_manifest_is_plain_json_that_lists_every_other_file(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest["files"]) == {"extra.json", "state/d/data", "state/empty"}
    assert manifest["files"]["state/d/data"]["bytes"] == 16
    assert manifest["step"] == 7


@pytest.mark.parametrize("name", [MANIFEST, "state/d/data"])
def test_a_flipped_bit_in_any_byte_is_noticed(folder: Path, name: str):
    sound = (folder / name).read_bytes()
    for index in range(len(sound)):
        flipped = bytearray(sound)
        flipped[index] ^= 1 << index % 8
        (folder / name).write_bytes(flipped)
        with pytest.raises(DamagedError, match=name):
            verify(folder, 7)


@pytest.mark.parametrize("name", [MANIFEST, "extra.json", "state/d/data"])
def test_every_truncation_is_noticed(folder: Path, name: str):
    sound = (folder / name).read_bytes()
    for length in range(len(sound)):
        (folder / name).write_bytes(sound[:length])
        with pytest.raises(DamagedError, match=name):
            verify(folder, 7)


@pytest.mark.parametrize("name", [MANIFEST, "extra.json", "state/d/data", "state/empty"])
def test_a_missing_file_is_noticed(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(DamagedError, match=f"{name} is missing"):
        verify(folder, 7)


def test_a_surplus_file_is_noticed(folder: Path):
    (folder / "state" / "added").touch()
    with pytest.raises(DamagedError, match="state/added is not in the manifest"):
        verify(folder, 7)


def test_a_file_that_cannot_be_read_is_damage(folder: Path):
    (folder / "extra.json").unlink()
    (folder / "extra.json").symlink_to("gone")
    with pytest.raises(DamagedError, match=r"extra\.json cannot be read"):
        verify(folder, 7)


def test_a_folder_renamed_to_another_step_is_noticed(folder: Path):
    with pytest.raises(DamagedError, match="is of step 7"):
        verify(folder, 8)
