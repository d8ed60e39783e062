"""Kinds of malformed dsjax weights and runs, and of conversions that were begun."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from malformed import (
    CONVERT,
    DEEP,
    DIGITS,
    ESCAPES,
    HEADERS,
    VERIFY,
    Spoil,
    cut,
    gone,
    is_fifo,
    is_folder,
    is_link,
    keys,
    kinds,
    large,
    nested,
    text,
)
from reference.configs import CONFIGS
from reference.weights import place, random_weights

from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config_files import load_pretrain_config

ARRAY = "weights/norm.weight/.zarray"
EXPERTS = "weights/moe_layers.ffn.experts.up/.zarray"
CHUNK = "weights/norm.weight/0"
STEP = "checkpoints/00000001"
PARTIAL = "../out.partial"
JOURNAL = "../out.partial.jsonl"


def write_ours(folder: Path) -> None:
    """dsjax weights, and a run of one step."""
    convert(folder / "single", folder / "ours")
    run, of = folder / "run", CONFIGS["v3"]
    run.mkdir()
    written = load_pretrain_config("cpu-tiny").model_copy(update={"model": of})
    (run / "config.yaml").write_text(yaml.safe_dump(written.model_dump(), sort_keys=False))
    with closing(CheckpointStore(run / "checkpoints", keep=2)) as store:
        store.save(1, {"model": place(of, random_weights(of))}, {})


# ---------------------------------------------------------------------------------------------
# Makers
# ---------------------------------------------------------------------------------------------


def manifest(change: Callable[[dict[str, Any]], object], home: str = "") -> Spoil:
    """A manifest that says something else, under a digest that is right."""

    def spoil(folder: Path) -> None:
        file = folder / home / "manifest.json"
        tree = json.loads(file.read_text())
        del tree["sha256"]
        rest = json.dumps(change(tree) or tree)[1:].encode()
        digest = hashlib.sha256(rest).hexdigest().encode()
        file.write_bytes(b'{"sha256": "%s",\n' % digest + rest)

    return spoil


def resigned(spoil: Spoil) -> Spoil:
    """A damaged file of a run, which its manifest lists as it is."""

    def change(folder: Path) -> None:
        spoil(folder)

        def sign(tree: dict[str, Any]) -> None:
            for name in tree["files"]:
                data = (folder / STEP / name).read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                tree["files"][name] = {"bytes": len(data), "sha256": digest}

        manifest(sign, STEP)(folder)

    return change


def every(pattern: str, data: bytes) -> Spoil:
    """Many files, all of this content."""
    return lambda folder: [f.write_bytes(data) for f in folder.rglob(pattern) if f.is_file()]


def begun(journal: bytes) -> Spoil:
    """A conversion that was begun, with this journal."""

    def spoil(folder: Path) -> None:
        (folder / PARTIAL).mkdir()
        (folder / JOURNAL).write_bytes(journal)

    return spoil


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
NO_ARRAY = "not an array as"

OURS = kinds(
    "ours",
    HEADERS,
    {
        "a chunk that stopped": ("bytes, expected", cut(CHUNK, -1)),
        "a chunk that is missing": ("is missing", gone(CHUNK)),
        "a chunk that is a folder": ("is missing", is_folder(CHUNK)),
        "a chunk that is a pipe": ("is missing", is_fifo(CHUNK)),
        "an array without a header": ("1 missing (model.norm.weight)", gone(ARRAY)),
        "a header in no JSON": ("not the JSON", text(ARRAY, "{")),
        "a header that is a folder": ("no regular file", is_folder(ARRAY)),
        "a header that is a pipe": ("no regular file", is_fifo(ARRAY)),
        "a header that is a device": ("no regular file", is_link(ARRAY, "/dev/zero")),
        "a header of a gigabyte": ("the limit is", large(ARRAY, 1_000_000_000)),
        "a header nested 100,000 deep": ("not the JSON", nested(ARRAY)),
        "a shape of 10^30": ("bytes, expected", keys(ARRAY, shape=[10**30], chunks=[10**30])),
        "a shape of a million numbers": (
            NO_ARRAY,
            keys(ARRAY, shape=[1 << 60] * 500_000, chunks=[1] * 500_000),
        ),
        "a shape of floats": (NO_ARRAY, keys(ARRAY, shape=[32.0])),
        "a shape of booleans": (NO_ARRAY, keys(ARRAY, shape=[True], chunks=[True])),
        "a shape of zero": (NO_ARRAY, keys(ARRAY, shape=[0])),
        "an unknown dtype": (NO_ARRAY, keys(ARRAY, dtype="<i4")),
        "a dtype that is a list": (NO_ARRAY, keys(ARRAY, dtype=["<f4"])),
        "a compressed array": (NO_ARRAY, keys(ARRAY, compressor={"id": "zstd"})),
        "another order": (NO_ARRAY, keys(ARRAY, order="F")),
        "chunks that do not divide": (NO_ARRAY, keys(ARRAY, chunks=[5])),
        "chunks that cut a tensor": ("cut", keys(ARRAY, chunks=[16])),
        "chunks that cut a tensor of a stack": ("cut", keys(EXPERTS, chunks=[2, 8, 12, 32])),
        "an unknown array": (
            "1 unknown (extra)",
            lambda folder: (
                (folder / "weights/extra").mkdir(),
                text("weights/extra/.zarray", (folder / ARRAY).read_bytes())(folder),
            ),
        ),
        "an unknown array that a terminal obeys": (
            "unknown (a\\x1b",
            lambda folder: (
                (folder / f"weights/{ESCAPES.replace(chr(0), '')}").mkdir(),
                text(
                    f"weights/{ESCAPES.replace(chr(0), '')}/.zarray", (folder / ARRAY).read_bytes()
                )(folder),
            ),
        ),
        "no configuration": ("expected a Hugging Face folder", gone("config.yaml")),
        "a configuration that is a list": ("expected a mapping", text("config.yaml", "[1]")),
        "a configuration in no YAML": ("cannot be read as YAML", text("config.yaml", "{")),
        "a configuration nested 100,000 deep": (
            "cannot be read as YAML",
            text("config.yaml", "[" * DEEP),
        ),
        "a configuration that laughs": ("cannot be read as YAML", text("config.yaml", LAUGHS)),
        "a configuration whose size laughs": (
            "cannot be read as YAML",
            text("config.yaml", LAUGHS + "vocab_size: *i"),
        ),
        "a configuration that merges": ("cannot be read as YAML", text("config.yaml", MERGES)),
        "a configuration of a date that is none": (
            "unknown key 'a'",
            text("config.yaml", "a: 2001-99-99"),
        ),
        "a configuration with a number of 5,000 digits": (
            "cannot be read as YAML",
            text("config.yaml", f"a: {DIGITS}"),
        ),
        "a configuration that runs": (
            "cannot be read as YAML",
            text("config.yaml", "!!python/object/apply:os.system [id]"),
        ),
        "a configuration of a gigabyte": ("the limit is", large("config.yaml", 1_000_000_000)),
        "a configuration of control characters": (
            "cannot be read as YAML",
            text("config.yaml", "a: \x1b[31m"),
        ),
        "10^9 layers": (
            "num_hidden_layers=1000000000",
            lambda folder: text(
                "config.yaml",
                (folder / "config.yaml")
                .read_text()
                .replace("hidden_layers: 3", "hidden_layers: 1000000000"),
            )(folder),
        ),
    },
)

RELEASED = kinds(
    "ours",
    (CONVERT,),
    {
        "a config.json of another model": (
            "config.yaml",
            keys("huggingface/config.json", rms_norm_eps=1e-3),
        ),
        "a config.json in no JSON": ("not the JSON", text("huggingface/config.json", "{")),
    },
)

MANIFEST = kinds(
    "ours",
    (VERIFY,),
    {
        "no manifest": ("has no manifest.json", gone("manifest.json")),
        "a manifest that is a folder": ("has no manifest.json", is_folder("manifest.json")),
        "an empty manifest": ("damaged", text("manifest.json", "")),
        "a manifest of another digest": ("does not have the digest", cut("manifest.json", -2)),
        "a manifest of a gigabyte": ("damaged", large("manifest.json", 1_000_000_000)),
        "a manifest without files": ("damaged", manifest(lambda tree: tree.pop("files") and None)),
        "a manifest whose files are a list": (
            "damaged",
            manifest(lambda tree: {**tree, "files": [1]}),
        ),
        "a manifest whose digest is a number": (
            "damaged",
            manifest(lambda tree: {**tree, "files": dict.fromkeys(tree["files"], 5)}),
        ),
        "a manifest without a step": ("damaged", manifest(lambda tree: tree.pop("step"))),
        "a manifest nested 100,000 deep": (
            "damaged",
            lambda folder: text(
                "manifest.json",
                (
                    b'{"sha256": "%s",\n'
                    % hashlib.sha256(b'"a":' + b"[" * DEEP).hexdigest().encode()
                    + b'"a":'
                    + b"[" * DEEP
                ),
            )(folder),
        ),
        "a manifest that leads out": (
            "is missing",
            manifest(lambda tree: tree["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        ),
        "a changed bit": ("does not have the digest", text(CHUNK, bytes(64))),
        "a file that is missing": ("is missing", gone(CHUNK)),
        "a file too many": ("is not in the manifest", text("extra", "")),
        "a pipe": ("no regular file", is_fifo(CHUNK)),
        "a link to itself": ("cannot be read", is_link(CHUNK, "0")),
    },
)

RUN = kinds(
    "run",
    HEADERS,
    {
        "no checkpoint": (
            "no sound checkpoint",
            lambda folder: (folder / STEP).rename(folder / "gone"),
        ),
        "checkpoints that are damaged": ("no sound checkpoint", cut(f"{STEP}/manifest.json", -2)),
        "leaves that are a list": (
            "no sound checkpoint",
            manifest(lambda tree: {**tree, "leaves": []}, STEP),
        ),
        "a leaf of an unknown dtype": (
            "no sound checkpoint",
            manifest(
                lambda tree: [leaf.update(dtype=[1]) for leaf in tree["leaves"].values()] and None,
                STEP,
            ),
        ),
        "a leaf of integers": (
            "int32",
            manifest(
                lambda tree: (
                    [leaf.update(dtype="int32") for leaf in tree["leaves"].values()] and None
                ),
                STEP,
            ),
        ),
        "a leaf of another shape": (
            "says float32 of [7",
            manifest(
                lambda tree: (
                    [leaf.update(shape=[7, *leaf["shape"][1:]]) for leaf in tree["leaves"].values()]
                    and None
                ),
                STEP,
            ),
        ),
        "a leaf without a shape": (
            "no sound checkpoint",
            manifest(
                lambda tree: [leaf.pop("shape") for leaf in tree["leaves"].values()] and None, STEP
            ),
        ),
        "no leaves": ("missing", manifest(lambda tree: {**tree, "leaves": {}}, STEP)),
        "arrays that are no database": (
            "cannot be read",
            resigned(every("manifest.ocdbt", b"x" * 100)),
        ),
        "a configuration without a model": ("model", text("config.yaml", "seed: 1")),
        "a configuration that is a folder": ("config.yaml", is_folder("config.yaml")),
    },
)
RUN += kinds(
    "run",
    (CONVERT,),
    {
        "arrays whose data are none": (
            "cannot be read",
            resigned(
                lambda folder: [
                    f.write_bytes(bytes(len(f.read_bytes()))) for f in folder.rglob("d/*")
                ]
            ),
        ),
    },
)

CHOSEN = json.dumps({"options": "--to dsjax --dtype as stored", "described": ""}).encode()

JOURNALS = kinds(
    "single",
    (CONVERT,),
    {
        "a folder in the way": ("in the way", lambda folder: (folder / PARTIAL).mkdir()),
        "a journal that is a folder": ("cannot be written", is_folder(JOURNAL)),
        "a journal that is a pipe": ("cannot be written", is_fifo(JOURNAL)),
        "an empty journal": ("no options that are known", begun(b"")),
        "a journal in no JSON": ("no options that are known", begun(b"garbage\n")),
        "a journal that is a list": ("no options that are known", begun(b"[1]\n")),
        "a journal nested 100,000 deep": ("no options that are known", begun(b"[" * DEEP + b"\n")),
        "a journal of another source": ("another source", begun(CHOSEN + b"\n")),
    },
)

WRITTEN = OURS + RELEASED + MANIFEST + RUN + JOURNALS
