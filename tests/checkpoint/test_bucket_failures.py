"""What a store refuses, or has not, is survived or said in one line."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from released_folders import BLOCKS, assert_same, write_released

import dsjax
from dsjax import places
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.inspect import report
from dsjax.checkpoint.source import open_source
from dsjax.errors import UserError
from dsjax.places import as_path
from tests.object_store import BUCKET, ObjectStore

Said = tuple[int | str | None, str, str]

REPOSITORY = Path(__file__).parents[2]
DST = f"gs://{BUCKET}/new/weights"


def test_transient_failures_are_survived(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request fails the first time, for whatever passing reason."""

    async def at_once(seconds: float) -> None:
        assert seconds <= 32

    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", at_once)
    weights = write_released(tmp_path / "hf", BLOCKS, "BF16")
    failed: set[tuple[str, str]] = set()

    def once(method: str, name: str) -> tuple[int, str] | None:
        if (method, name) in failed:
            return None
        failed.add((method, name))
        return (503, "backend error") if len(failed) % 2 else (429, "slow down")

    store.fail = once
    convert(tmp_path / "hf", as_path(DST), to="hf")
    convert(as_path(DST), tmp_path / "back", to="hf")
    assert_same(tmp_path / "back", weights)
    assert len(failed) > 10


def test_a_silent_store_is_asked_again(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SILENCE", 0.3)
    silent = [0.8]

    def wait(method: str, name: str) -> None:
        if name.endswith(".json") and silent:
            time.sleep(silent.pop())

    write_released(tmp_path / "hf", BLOCKS, "BF16")
    address = store.put_folder("hf", tmp_path / "hf")
    store.fail = wait
    assert report(address)["family"] == "deepseek_v3"
    assert store.seen["GET hf/config.json"] + store.seen["GET hf/model.safetensors.index.json"] == 3


def test_what_fails_for_good_while_writing_is_gone_on_from(
    store: ObjectStore, several: None, tmp_path: Path
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    store.fail = lambda method, name: (403, "quota") if "-00004-" in name else None
    with pytest.raises(UserError, match=r"cannot be finished now: .*quota.*goes on from here"):
        convert(tmp_path / "hf", as_path(DST), to="hf")
    assert store.tree("new/weights.partial")
    store.fail = lambda method, name: None
    convert(tmp_path / "hf", as_path(DST), to="hf", verify=True)


@pytest.mark.parametrize(
    ("status", "message", "says"),
    [
        (403, "no storage.objects.list access", "permission denied (no storage.objects.list"),
        (401, "Anonymous caller", "permission denied (Anonymous caller, 401); log in by"),
        (400, "what is this", "the store failed (what is this, 400); try again later"),
    ],
)
def test_a_refusal_is_one_line(
    store: ObjectStore,
    tmp_path: Path,
    command: Callable[..., Said],
    status: int,
    message: str,
    says: str,
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    address = store.put_folder("hf", tmp_path / "hf")
    store.fail = lambda method, name: (status, message)
    code, out, err = command("inspect", address)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", f"gs://{BUCKET}/none"], f"gs://{BUCKET}/none: no such folder; expected"),
        (["inspect", "gs://other/model"], "gs://other/model: no such object, or no such bucket"),
        (["inspect", "gs://"], "gs://: names no bucket"),
        (["inspect", "s3://bucket/model"], "expected a path of this machine or gs://BUCKET/PATH"),
        (["convert", f"gs://{BUCKET}/m.gguf", "out"], "a GGUF file must be on a disk"),
        (["inspect", f"gs://{BUCKET}/run"], "config.yaml: no such"),
    ],
)
def test_what_is_not_there_or_not_read_is_one_line(
    store: ObjectStore, command: Callable[..., Said], arguments: list[str], says: str
) -> None:
    store.put("m.gguf", b"GGUF")
    store.put("run/checkpoints/00000001/manifest.json", b"{}")
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err


def test_an_object_that_became_shorter_is_told_of(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16", shards=1)
    address = store.put_folder("hf", tmp_path / "hf")
    name = next(name for name in store.objects if name.endswith(".safetensors"))
    source = open_source(as_path(address))
    store.put(name, store.objects[name][:1000])
    with pytest.raises(UserError, match="became shorter while it was read; fetch it again"):
        source.stored["model.norm.weight"].read()
    with pytest.raises(UserError, match="truncated: 1000 bytes, but"):
        dsjax.load(address)


def test_without_the_package_it_is_named(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(UserError, match=r"needs the gcsfs package: pip install 'dsjax\[gcs\]'"):
        report(f"gs://{BUCKET}/model")


def test_paths_of_this_machine_import_nothing_of_an_object_store(tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    code = (
        "import sys\nfrom dsjax.checkpoint.inspect import report\n"
        f"report({str(tmp_path / 'hf')!r})\n"
        "print(sorted({'gcsfs', 'fsspec', 'aiohttp', 'google', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
