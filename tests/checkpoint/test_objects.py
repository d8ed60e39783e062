"""Models in a bucket are converted, loaded and inspected as on a disk; a stand-in is the store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from object_store import BUCKET, ObjectStore
from released_folders import BLOCKS, assert_same, tree_of, write_released

import dsjax
from dsjax import places
from dsjax.checkpoint import conversion, weights_folder
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.inspect import report
from dsjax.checkpoint.source import open_source
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from dsjax.model.layers import variables
from dsjax.places import as_path
from sharding.mesh import make_mesh

REPOSITORY = Path(__file__).parents[2]
DST = f"gs://{BUCKET}/new/weights"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A bucket that the library takes for the store."""
    with ObjectStore() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.address)
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setattr("random.random", lambda: 0.0)  # how long the library waits to retry
        places._store.cache_clear()
        yield running


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, chunks and windows: several of each."""
    monkeypatch.setattr(conversion, "SHARD_BYTES", 150_000)
    monkeypatch.setattr(weights_folder, "CHUNK_BYTES", 150_000)


def held(model: object) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in variables(model)}


def assert_equal(one: object, other: object) -> None:
    first, second = held(one), held(other)
    assert first.keys() == second.keys()
    for path, array in first.items():
        assert array.dtype == second[path].dtype, path
        assert array.tobytes() == second[path].tobytes(), path


def command(store: ObjectStore, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---------------------------------------------------------------------------------------------
# Converting
# ---------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "expert": 2}, {"tensor": 8}])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F32"])
def test_loading_from_a_bucket_equals_loading_from_a_disk(
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    sizes: dict[str, int] | None,
) -> None:
    monkeypatch.setattr("dsjax.checkpoint.from_objects.WINDOW", 50_000)
    write_released(tmp_path / "hf", BLOCKS, dtype)
    convert(tmp_path / "hf", tmp_path / "dsjax")
    mesh = None if sizes is None else make_mesh(sizes)
    for name in ("hf", "dsjax"):
        address = store.put_folder(name, tmp_path / name)
        assert_equal(dsjax.load(address, mesh=mesh), dsjax.load(tmp_path / name, mesh=mesh))


def test_loading_fetches_each_byte_of_the_weights_once(store: ObjectStore, tmp_path: Path) -> None:
    """Headers too, and what MTP repeats; on every mesh, whatever its devices share."""
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    convert(tmp_path / "hf", tmp_path / "dsjax")
    for name, suffix in (("hf", ".safetensors"), ("dsjax", "0")):
        address = store.put_folder(name, tmp_path / name)
        for sizes in ({"data": 8}, {"fsdp": 4, "expert": 2}):
            store.forget()
            dsjax.load(address, mesh=make_mesh(sizes))
            files = {key: data for key, data in store.objects.items() if key.endswith(suffix)}
            files = {key: data for key, data in files.items() if key.startswith(f"{name}/")}
            assert len(files) > 2
            assert {key: store.sent[key] for key in files} == {k: len(v) for k, v in files.items()}


def test_devices_that_hold_half_of_a_matrix_fetch_half_of_it(
    store: ObjectStore, tmp_path: Path
) -> None:
    """As a host of two does: of what it does not hold it fetches nothing."""
    from dsjax.checkpoint.from_objects import fetch

    write_released(tmp_path / "hf", BLOCKS, "F32")
    source = open_source(as_path(store.put_folder("hf", tmp_path / "hf")))
    pieces = [t for t in source.parts if t.path == "embed.weight"]
    store.forget()
    shape = pieces[0].inner

    class Host:
        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
            half, quarter = shape[0] // 2, shape[0] // 4
            rows = (slice(half, half + quarter), slice(half + quarter, None), slice(half, None))
            return {i: (part, slice(None)) for i, part in enumerate(rows)}

    found = fetch(pieces, source, shape, Host())[pieces[0].name].read()
    whole = dsjax.load(tmp_path / "hf")
    half = shape[0] // 2
    assert np.array_equal(found[half:], held(whole)["embed.weight"][half:])
    expected = found[half:].nbytes
    copies = [t for t in source.parts if t.repeats == pieces[0].name]
    assert sum(store.sent.values()) == expected * (1 + len(copies))


def test_a_repeat_that_differs_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    weights = write_released(tmp_path / "hf", BLOCKS, "F32")
    name = next(name for name in weights if name.endswith("shared_head.head.weight"))
    weights[name] = weights[name].copy()
    weights[name][-1, -1] += 1
    write_released(tmp_path / "bad", BLOCKS, "F32", weights=weights)
    with pytest.raises(UserError, match=f"{name} differs from lm_head.weight"):
        dsjax.load(store.put_folder("bad", tmp_path / "bad"))


def test_inspecting_reads_headers_and_nothing_else(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    convert(tmp_path / "hf", tmp_path / "dsjax")
    for name in ("hf", "dsjax"):
        address = store.put_folder(name, tmp_path / name)
        store.forget()
        found, expected = report(address), report(str(tmp_path / name))
        assert found.pop("source") == address
        expected.pop("source")
        assert found == expected
        for key, sent in store.sent.items():
            data = store.objects[key]
            if key.endswith(".safetensors"):
                assert sent == 8 + int.from_bytes(data[:8], "little")
            else:
                assert key.endswith((".zarray", "/config.json", "/config.yaml", ".index.json"))
                assert sent == len(data)
        listings = sum(n for request, n in store.seen.items() if request == "GET ")
        assert listings == -(-len(store.tree(name)) // store.page), "asked for more than once"


def test_verifying_in_a_bucket_finds_what_changed(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    convert(tmp_path / "hf", as_path(DST))
    done = command(store, "-m", "dsjax", "inspect", "--verify", "--json", DST)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verified"]["files"] == len(store.tree("new/weights"))
    key = "new/weights/weights/embed.weight/0.0"
    store.put(key, store.objects[key][:-1] + b"\xff")
    done = command(store, "-m", "dsjax", "inspect", "--verify", DST)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "weights/embed.weight/0.0 does not have the digest in the manifest" in done.stderr


def test_a_tokenizer_is_read_from_a_bucket(store: ObjectStore, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text, and some more of it"] * 3, 300)
    tokenizer.save(tmp_path / "run/tokenizer")
    address = store.put_folder("run", tmp_path / "run")
    for path in (address, f"{address}/tokenizer", f"{address}/tokenizer/tokenizer.json"):
        assert dsjax.load_tokenizer(path).digest == tokenizer.digest


def test_saving_into_a_bucket_equals_saving_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    model = dsjax.load(tmp_path / "hf")
    dsjax.save(model, DST)
    dsjax.save(model, tmp_path / "saved")
    assert store.tree("new/weights") == tree_of(tmp_path / "saved")
    assert jnp.isfinite(dsjax.load(DST)(jnp.arange(8)[None]).logits).all()


# ---------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------


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
    store: ObjectStore, tmp_path: Path, status: int, message: str, says: str
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    address = store.put_folder("hf", tmp_path / "hf")
    store.fail = lambda method, name: (status, message)
    done = command(store, "-m", "dsjax", "inspect", address)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", f"gs://{BUCKET}/none"], f"gs://{BUCKET}/none: no such folder; expected"),
        (["inspect", "gs://other/model"], "gs://other/model: no such object, or no such bucket"),
        (["inspect", "gs://"], "gs://: names no bucket"),
        (["inspect", "s3://bucket/model"], "expected a path of this machine or gs://BUCKET/PATH"),
        (["convert", f"gs://{BUCKET}/m.gguf", "out"], "a GGUF file must be on a disk"),
        (["inspect", f"gs://{BUCKET}/run"], "a run must be on a disk"),
    ],
)
def test_what_is_not_there_or_not_read_is_one_line(
    store: ObjectStore, arguments: list[str], says: str
) -> None:
    store.put("m.gguf", b"GGUF")
    store.put("run/checkpoints/00000001/manifest.json", b"{}")
    done = command(store, "-m", "dsjax", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


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


def test_training_says_that_it_wants_disks(store: ObjectStore) -> None:
    for key, says in (
        ("run_dir", "a run directory must be on a disk"),
        ("data.sources.0.path", "training data must be on a disk"),
    ):
        done = command(store, "train.py", "cpu-tiny", f"{key}=gs://{BUCKET}/place")
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (REPOSITORY / "gs:").exists()


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
