"""Killed, a conversion goes on; and what it goes on to is what an unbroken one writes."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from released_folders import BLOCKS, tree_of, write_released

from dsjax.checkpoint.convert import convert
from dsjax.errors import UserError

REPOSITORY = Path(__file__).parents[2]
KILLS = 10

SLOWLY = """\
import time
from dsjax import cli
from dsjax.checkpoint import conversion, weights_folder, writing
conversion.SHARD_BYTES = weights_folder.CHUNK_BYTES = 150_000
slabs = writing.slabs
def slowly(item):
    for slab in slabs(item):
        time.sleep({delay})
        yield slab
writing.slabs = slowly
cli.main()
"""


def start(*arguments: object, delay: float = 0.01) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY.format(delay=delay), "convert", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.005)


def ages(partial: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file that the journal lists."""
    journal = partial.with_name(f"{partial.name}.jsonl").read_text()
    found = {}
    for path in partial.rglob("*"):
        name = path.relative_to(partial).as_posix()
        if path.is_file() and f'"{name}"' in journal and journal.endswith("\n"):
            found[name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


@pytest.mark.parametrize("to", ["hf", "dsjax"])
def test_killed_at_random_moments_it_goes_on_and_ends_the_same(tmp_path: Path, to: str) -> None:
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    arguments = (tmp_path / "hf", tmp_path / "whole", "--to", to, "--dtype", "bfloat16")
    begin = time.monotonic()
    with start(*arguments) as unbroken:
        wait_for(tmp_path / "whole.partial")
        begin = time.monotonic()
        assert unbroken.wait(30) == 0
    duration = time.monotonic() - begin
    expected = tree_of(tmp_path / "whole")

    rng = random.Random(0)
    killed = resumed = 0
    arguments = (tmp_path / "hf", tmp_path / "out", *arguments[2:])
    partial = tmp_path / "out.partial"
    while killed < KILLS // 2:  # the other half with the other format
        before = ages(partial) if partial.exists() else {}
        resumed += bool(before)
        with start(*arguments) as process:
            wait_for(partial)
            time.sleep(rng.uniform(0, 0.6 * duration))
            process.send_signal(signal.SIGKILL)
            ended = process.wait(30)
        if ended == 0:
            assert tree_of(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
            continue
        assert ended == -signal.SIGKILL
        killed += 1
        assert not (tmp_path / "out").exists()
        after = ages(partial)
        assert {name: after[name] for name in before} == before, "a finished file was redone"
    assert resumed > 0
    with start(*arguments) as last:
        assert last.wait(30) == 0
    assert tree_of(tmp_path / "out") == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out", "whole"]


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conversion that was interrupted after some shards."""
    from dsjax.checkpoint import conversion, writing

    monkeypatch.setattr(conversion, "SHARD_BYTES", 150_000)
    monkeypatch.setattr(writing, "THREADS", 1)
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    slabs, count = writing.slabs, 0

    def interrupting(item):
        nonlocal count
        count += 1
        if count > 60:
            raise KeyboardInterrupt
        yield from slabs(item)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "slabs", interrupting)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "hf", tmp_path / "out", to="hf")
    assert ages(tmp_path / "out.partial")
    return tmp_path


def test_it_goes_on_only_with_the_same_options(interrupted: Path) -> None:
    kept = tree_of(interrupted / "out.partial")
    with pytest.raises(UserError, match="was begun with --to hf --dtype as stored; give the same"):
        convert(interrupted / "hf", interrupted / "out", to="hf", dtype="float32")
    with pytest.raises(UserError, match="was begun with --to hf"):
        convert(interrupted / "hf", interrupted / "out", to="dsjax")
    assert tree_of(interrupted / "out.partial") == kept
    convert(interrupted / "hf", interrupted / "out", to="hf", verify=True)


def test_it_goes_on_only_from_the_same_source(interrupted: Path) -> None:
    write_released(interrupted / "other", BLOCKS, "BF16")
    with pytest.raises(UserError, match="another source, or the source has changed since"):
        convert(interrupted / "other", interrupted / "out", to="hf")
    (interrupted / "hf/tokenizer.json").write_text("changed")
    with pytest.raises(UserError, match="another source, or the source has changed since"):
        convert(interrupted / "hf", interrupted / "out", to="hf")


def test_a_disk_without_room_for_the_rest_costs_nothing_that_is_finished(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = ages(interrupted / "out.partial")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(UserError, match="make room"):
            convert(interrupted / "hf", interrupted / "out", to="hf")
    assert ages(interrupted / "out.partial") == finished
    convert(interrupted / "hf", interrupted / "out", to="hf", verify=True)


def test_a_line_of_the_journal_that_was_cut_off_is_no_line(interrupted: Path) -> None:
    journal = interrupted / "out.partial.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    convert(interrupted / "hf", interrupted / "out", to="hf", verify=True)
    convert(interrupted / "hf", interrupted / "again", to="hf")
    assert tree_of(interrupted / "again") == tree_of(interrupted / "out")


def test_a_finished_file_that_was_shortened_is_written_again(interrupted: Path) -> None:
    name = min(ages(interrupted / "out.partial"))
    with (interrupted / "out.partial" / name).open("r+b") as file:
        file.truncate(10)
    convert(interrupted / "hf", interrupted / "out", to="hf", verify=True)


def test_a_folder_in_the_way_that_is_of_no_conversion_is_left_alone(tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").write_text("mine")
    with pytest.raises(UserError, match="in the way, and of no conversion"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert (tmp_path / "out.partial/mine").read_text() == "mine"


def test_two_conversions_do_not_write_the_same_folder(tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    with start(tmp_path / "hf", tmp_path / "out", delay=0.02) as first:
        wait_for(tmp_path / "out.partial")
        with pytest.raises(UserError, match="another conversion is writing it"):
            convert(tmp_path / "hf", tmp_path / "out")
        assert first.wait(30) == 0
    assert (tmp_path / "out/manifest.json").is_file()
