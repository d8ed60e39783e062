"""Models in a bucket are loaded and inspected as on a disk; a stand-in is the store."""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from released_folders import BLOCKS, tree_of, weights_of, write_released

import dsjax
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.inspect import report
from dsjax.checkpoint.source import open_source
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from dsjax.model.layers import variables
from dsjax.places import as_path
from dsjax.serving.options import ModelOptions
from dsjax.serving.protocol import load_served
from sharding.mesh import make_mesh
from tests.object_store import BUCKET, ObjectStore

Said = tuple[int | str | None, str, str]

DST = f"gs://{BUCKET}/new/weights"


def held(model: object) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in variables(model)}


def assert_equal(one: object, other: object) -> None:
    first, second = held(one), held(other)
    assert first.keys() == second.keys()
    for path, array in first.items():
        assert array.dtype == second[path].dtype, path
        assert array.tobytes() == second[path].tobytes(), path


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("F8_E4M3", {"fsdp": 2, "expert": 2, "tensor": 2}), ("F32", None)],
)
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


@pytest.mark.parametrize("rows", [False, True], ids=["a scale a block", "a scale a row"])
def test_other_makers_folders_are_loaded_from_a_bucket(
    store: ObjectStore, tmp_path: Path, rows: bool
) -> None:
    """Scales in bfloat16, or for each row; rotary frequencies stored, MTP's copies not."""
    weights = {
        name: weight.astype(ml_dtypes.bfloat16) if name.endswith("_scale_inv") else weight
        for name, weight in weights_of(BLOCKS, "F8_E4M3").items()
        if not name.endswith(("3.embed_tokens.weight", "shared_head.head.weight"))
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    if rows:
        for name in [n for n in weights if n.endswith("_scale_inv")]:
            count = len(weights[name.removesuffix("_scale_inv")])
            weights[name] = np.linspace(0.5, 1, count, dtype=np.float32)[:, None]
    keys: dict[str, Any] = {"quantization_config": {"quant_method": "fp8"}} if rows else {}
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3", weights=weights, **keys)
    address, mesh = store.put_folder("hf", tmp_path / "hf"), make_mesh({"fsdp": 2, "expert": 4})
    assert_equal(dsjax.load(address, mesh=mesh), dsjax.load(tmp_path / "hf", mesh=mesh))
    convert(as_path(address), tmp_path / "out", to="hf")
    convert(tmp_path / "hf", tmp_path / "same", to="hf")
    assert tree_of(tmp_path / "out") == tree_of(tmp_path / "same")


def test_loading_fetches_each_byte_of_the_weights_once(store: ObjectStore, tmp_path: Path) -> None:
    """Headers too, and what MTP repeats; on every mesh, whatever its devices share."""
    write_released(tmp_path / "hf", BLOCKS, "F8_E4M3")
    convert(tmp_path / "hf", tmp_path / "dsjax")
    for name, suffix, sizes in (
        ("hf", ".safetensors", {"fsdp": 4, "expert": 2}),
        ("dsjax", "0", {"data": 8}),
    ):
        address = store.put_folder(name, tmp_path / name)
        store.forget()
        dsjax.load(address, mesh=make_mesh(sizes))
        files = {k: v for k, v in store.tree(name).items() if k.endswith(suffix)}
        assert len(files) > 2
        assert {k: store.sent[f"{name}/{k}"] for k in files} == {k: len(files[k]) for k in files}


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


def test_verifying_in_a_bucket_finds_what_changed(
    store: ObjectStore, tmp_path: Path, command: Callable[..., Said]
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    convert(tmp_path / "hf", as_path(DST))
    code, out, err = command("inspect", "--verify", "--json", DST)
    assert (code, err) == (0, "")
    assert json.loads(out)["verified"]["files"] == len(store.tree("new/weights"))
    key = "new/weights/weights/embed.weight/0.0"
    store.put(key, store.objects[key][:-1] + b"\xff")
    code, _, err = command("inspect", "--verify", DST)
    assert code == 2
    assert err.count("\n") == 1
    assert "weights/embed.weight/0.0 does not have the digest in the manifest" in err


def test_a_tokenizer_is_read_from_a_bucket(store: ObjectStore, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text, and some more of it"] * 3, 300)
    tokenizer.save(tmp_path / "run/tokenizer")
    address = store.put_folder("run", tmp_path / "run")
    for path in (address, f"{address}/tokenizer", f"{address}/tokenizer/tokenizer.json"):
        assert dsjax.load_tokenizer(path).digest == tokenizer.digest


def test_a_door_knows_of_a_model_in_a_bucket_what_it_knows_on_a_disk(
    store: ObjectStore, tmp_path: Path
) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    train_tokenizer(["some text"], 300).save(tmp_path / "hf")
    address = store.put_folder("hf", tmp_path / "hf")
    parser = ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    options = ModelOptions.of(parser.parse_args([address]))
    assert (str(options.checkpoint), options.name) == (address, "hf")
    found, expected = (
        load_served(folder, "hf", vocab_size=500, context=16)
        for folder in (options.checkpoint, tmp_path / "hf")
    )
    assert found.tokenizer.digest == expected.tokenizer.digest
    assert found.defaults == expected.defaults == {"temperature": 0.6}
    assert found.template is not None


def test_saving_into_a_bucket_equals_saving_on_a_disk(store: ObjectStore, tmp_path: Path) -> None:
    write_released(tmp_path / "hf", BLOCKS, "BF16")
    model = dsjax.load(tmp_path / "hf")
    dsjax.save(model, DST)
    dsjax.save(model, tmp_path / "saved")
    assert store.tree("new/weights") == tree_of(tmp_path / "saved")
    assert jnp.isfinite(dsjax.load(DST)(jnp.arange(8)[None]).logits).all()
