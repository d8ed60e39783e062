"""Conversions into a bucket and out of it are those on a disk; a stand-in is the store."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from released_folders import BLOCKS, assert_same, tree_of, write_released

from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.inspect import report
from dsjax.errors import UserError
from dsjax.places import as_path
from tests.object_store import BUCKET, ObjectStore

REPOSITORY = Path(__file__).parents[2]
DST = f"gs://{BUCKET}/new/weights"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F32"])
def test_there_and_back_through_a_bucket_every_bit_is_the_same(
    store: ObjectStore, several: None, tmp_path: Path, dtype: str
) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, dtype)
    convert(tmp_path / "hf", Path(DST), verify=True)
    convert(as_path(DST), as_path(f"gs://{BUCKET}/hf"), verify=True)
    convert(as_path(f"gs://{BUCKET}/hf"), tmp_path / "back", to="hf", verify=True)
    assert_same(tmp_path / "back", weights)
    convert(tmp_path / "hf", tmp_path / "dsjax")
    assert store.tree("new/weights") == tree_of(tmp_path / "dsjax")
    convert(tmp_path / "dsjax", tmp_path / "again")
    assert store.tree("hf") == tree_of(tmp_path / "again") == tree_of(tmp_path / "back")
    assert store.uploads == {}
    assert {name.split("/")[0] for name in store.objects} == {"new", "hf"}


def test_what_opens_a_folder_is_written_last(
    store: ObjectStore, several: None, tmp_path: Path
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    convert(tmp_path / "hf", as_path(DST))
    convert(tmp_path / "hf", as_path(f"gs://{BUCKET}/hf"), to="hf")
    for folder, last in (("new/weights", "config.yaml"), ("hf", "config.json")):
        when = {k: v for k, v in store.generations.items() if k.startswith(f"{folder}/")}
        assert sorted(when, key=lambda k: when[k])[-2:] == [
            f"{folder}/manifest.json",
            f"{folder}/{last}",
        ]


def test_what_is_there_already_is_left_alone(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    store.put("new/weights/mine", b"mine")
    with pytest.raises(UserError, match=f"{DST}: exists already; choose a new folder"):
        convert(tmp_path / "hf", as_path(DST))
    with pytest.raises(UserError, match="is a whole bucket; choose a folder in it"):
        convert(tmp_path / "hf", as_path(f"gs://{BUCKET}"))
    assert list(store.objects) == ["new/weights/mine"]


SLOWLY = """\
import time
from dsjax import cli
from dsjax.checkpoint import conversion, weights_folder, writing
conversion.SHARD_BYTES = weights_folder.CHUNK_BYTES = 150_000
writing.REQUESTS = 2
slabs = writing.slabs
def slowly(item):
    for slab in slabs(item):
        time.sleep(0.02)
        yield slab
writing.slabs = slowly
cli.main()
"""


@pytest.mark.parametrize("to", ["hf", "dsjax"])
def test_killed_in_the_middle_it_goes_on_with_what_is_not_finished(
    store: ObjectStore, several: None, tmp_path: Path, to: str
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    arguments = ("-c", SLOWLY, "convert", tmp_path / "hf", DST, "--to", to)
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPOSITORY, stderr=subprocess.PIPE
    ) as process:
        limit = time.monotonic() + 20
        while len(store.tree("new/weights.partial")) < 4:  # what was begun, and three jobs
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    with pytest.raises(UserError, match=r"a folder without config.json, weights/ or|no such"):
        report(DST)
    listed = store.tree("new/weights.partial")
    listed.pop("begun.json")
    done = {f"new/weights/{name}" for text in listed.values() for name in json.loads(text)}
    before = {name: store.generations[name] for name in done}
    assert before
    with pytest.raises(UserError, match=r"was begun with --to .*; give the same, or remove it"):
        convert(tmp_path / "hf", as_path(DST), to=to, dtype="float32")
    convert(tmp_path / "hf", as_path(DST), to=to, verify=True)
    assert {name: store.generations[name] for name in done} == before, "finished, and redone"
    convert(tmp_path / "hf", tmp_path / "whole", to=to)
    assert store.tree("new/weights") == tree_of(tmp_path / "whole")
    assert store.tree("new/weights.partial") == {}


def test_a_damaged_source_leaves_nothing_in_the_bucket(
    store: ObjectStore, several: None, tmp_path: Path
) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F32")
    weights["model.norm.weight"][-1] = np.nan
    write_released(tmp_path / "bad", BLOCKS, "F32", weights=weights)
    with pytest.raises(UserError, match=r"model.norm.weight holds NaN or infinity"):
        convert(tmp_path / "bad", as_path(DST))
    assert store.objects == {}
