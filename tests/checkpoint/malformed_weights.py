"""Kinds of malformed weights in a released folder: headers, ranges, shards, tensors, values."""

from __future__ import annotations

import json

import numpy as np
from malformed import (
    CONVERT,
    COPY,
    DEEP,
    DIGITS,
    ESCAPES,
    HEADERS,
    NORM,
    SHARD,
    UP,
    cut,
    entry,
    gone,
    header,
    header_text,
    is_fifo,
    is_folder,
    is_link,
    keys,
    kinds,
    large,
    nested,
    renamed,
    shifted,
    swapped,
    text,
    value,
    weight_map,
)

from dsjax.checkpoint.safetensors import INDEX, SINGLE

F32_8 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(F32_8).encode(),) * 2)

HEADER = kinds(
    "single",
    HEADERS,
    {
        "an empty file": ("truncated", text(SINGLE, b"")),
        "seven bytes": ("truncated", text(SINGLE, bytes(7))),
        "a header of no bytes": ("not the JSON", text(SINGLE, bytes(8))),
        "a header of 2^60 bytes": ("the limit is", header_text(b"{}", 1 << 60)),
        "a header of 2^64 - 1 bytes": ("the limit is", header_text(b"{}", (1 << 64) - 1)),
        "a header longer than the file": ("truncated", header_text(b"{}", 10_000_000)),
        "a header of 19 MB of brackets": (
            "expected a JSON object",
            header_text(b"[" + b"[]," * 6_300_000 + b"[]]"),
        ),
        "a header of 19 MB of objects": (
            "stands twice",
            header_text(b'{"a":[' + b"{}," * 6_300_000 + b'{}],"a":1}'),
        ),
        "a pickle in disguise": (
            "the limit is",
            text(SINGLE, b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x02os"),
        ),
        "a zip of PyTorch in disguise": ("the limit is", text(SINGLE, b"PK\3\4" + bytes(1000))),
        "a web page": ("the limit is", text(SINGLE, "<!DOCTYPE html><html>404</html>")),
        "a pointer of git's": (
            "the limit is",
            text(SINGLE, "version https://git-lfs.github.com/spec/v1"),
        ),
        "text in no JSON": ("not the JSON", header_text(b"{'a': 1}")),
        "no UTF-8": ("not the JSON", header_text(b'{"\xff": 1}')),
        "a byte order mark": ("not the JSON", header_text(b"\xef\xbb\xbf{}")),
        "a list": ("expected a JSON object, found list", header_text(b"[1, 2]")),
        "a number": ("expected a JSON object, found int", header_text(b"17")),
        "nested 100,000 deep": ("not the JSON", header_text(b"[" * DEEP)),
        "a header with a number of 5,000 digits": (
            "not the JSON",
            header_text(b'{"a": %s}' % DIGITS.encode()),
        ),
        "a header with NaN": ("NaN is not JSON", header_text(b'{"a": NaN}')),
        "a name that stands twice": ("'a' stands twice", header_text(TWICE, data=bytes(8))),
        "a name that a terminal obeys": ("printable", header(renamed(NORM, ESCAPES))),
        "a name of half a character": ("printable", header(renamed(NORM, "\ud800"))),
        "metadata that is no object": (
            "__metadata__",
            header(lambda tree: tree.update(__metadata__=[1])),
        ),
        "metadata that is no text": (
            "__metadata__",
            header(lambda tree: tree.update(__metadata__={"a": 1})),
        ),
        "a tensor that is a list": (
            "is described by",
            header(lambda tree: tree.update({NORM: [0, 8]})),
        ),
        "a tensor with more keys": ("is described by", entry(stride=[1])),
        "a tensor without a shape": (
            "is described by",
            header(lambda tree: tree[NORM].pop("shape")),
        ),
        "an unknown dtype": ("unknown dtype 'F99'", entry(dtype="F99")),
        "a dtype of a megabyte": ("unknown dtype", entry(dtype="F" * 1_000_000)),
        "a dtype that is a list": ("unknown dtype", entry(dtype=["BF16"])),
        "another dtype of other size": ("takes 128 bytes", entry(dtype="F32")),
        "a shape of floats": ("are not sizes", entry(shape=[32.0])),
        "a shape of texts": ("are not sizes", entry(shape=["32"])),
        "a shape of booleans": ("are not sizes", entry(shape=[True, 32])),
        "a shape that is null": ("are not sizes", entry(shape=None)),
        "a shape with a negative size": ("are not sizes", entry(shape=[-32])),
        "two negative sizes": ("are not sizes", entry(shape=[-4, -8])),
        "a shape whose product is 2^64": ("are not sizes", entry(shape=[1 << 32, 1 << 32])),
        "a shape of nothing times 2^100": ("are not sizes", entry(shape=[0, 1 << 50, 1 << 50])),
        "a shape of 2^63": ("are not sizes", entry(shape=[1 << 63])),
        "a shape of a million numbers": ("are not sizes", entry(shape=[1 << 60] * 800_000)),
        "a shape of a million ones": ("are not sizes", entry(shape=[1] * 1_000_000)),
        "another shape of the same size": ("misshaped", entry(shape=[2, 16])),
    },
)

RANGES = kinds(
    "single",
    HEADERS,
    {
        "a range that overlaps": (
            "inside the tensor before",
            header(lambda tree: shifted(tree, -2)),
        ),
        "a range that leaves a hole": ("belong to nothing", header(lambda tree: shifted(tree, 2))),
        "a range from another tensor": (
            "inside the tensor before",
            header(lambda tree: tree.update({NORM + "2": tree[NORM]})),
        ),
        "a range that runs backwards": ("hold -64", entry(data_offsets=[64, 0])),
        "a range before the file": ("are not sizes", entry(data_offsets=[-64, 0])),
        "a range behind the file": (
            "belong to nothing",
            entry(data_offsets=[1 << 62, (1 << 62) + 64]),
        ),
        "a range of three numbers": ("are not sizes", entry(data_offsets=[0, 64, 128])),
        "a range of floats": ("are not sizes", entry(data_offsets=[0.0, 64.0])),
        "a download that stopped": ("truncated", cut(SINGLE, -1)),
        "a download that stopped early": ("truncated", cut(SINGLE, 20_000)),
        "a download that wrote zeros": (
            "not the JSON",
            lambda folder: text(SINGLE, bytes((folder / SINGLE).stat().st_size))(folder),
        ),
        "bytes at the end": (
            "at its end belong to no tensor",
            lambda folder: text(SINGLE, (folder / SINGLE).read_bytes() + b"\0")(folder),
        ),
    },
)

SHARDS = kinds(
    "sharded",
    HEADERS,
    {
        "a missing shard": ("cannot be read", gone(SHARD)),
        "shards that were swapped": ("says that", swapped),
        "a shard that stopped": ("truncated", cut(SHARD, -100)),
        "a shard that is a folder": ("no regular file", is_folder(SHARD)),
        "a shard that is a pipe": ("no regular file", is_fifo(SHARD)),
        "a shard that is a device": ("no regular file", is_link(SHARD, "/dev/zero")),
        "a shard that links to itself": ("cannot be read", is_link(SHARD, SHARD)),
        "a shard that links to nothing": ("cannot be read", is_link(SHARD, "blobs/nothing")),
        "no index": ("no weights", gone(INDEX)),
        "an index that is a folder": ("no weights", is_folder(INDEX)),
        "an index that is a pipe": ("no weights", is_fifo(INDEX)),
        "an index beside a single file": ("remove the one that is stale", text(SINGLE, b"")),
        "an index in no JSON": ("not the JSON", text(INDEX, "{")),
        "an index that is a list": ("expected a JSON object", text(INDEX, "[]")),
        "an index nested 100,000 deep": ("not the JSON", nested(INDEX)),
        "an index of a gigabyte": ("the limit is", large(INDEX, 1_000_000_000)),
        "an index of half a million names": (
            "cannot be read",
            text(INDEX, json.dumps({"weight_map": {f"{i:x}": "s1" for i in range(500_000)}})),
        ),
        "an index of nothing": ("expected a weight_map", keys(INDEX, weight_map={})),
        "an index of texts": ("expected a weight_map", keys(INDEX, weight_map=[NORM])),
        "an index with a name twice": (
            "stands twice",
            text(INDEX, '{"weight_map":{"a":"b","a":"c"}}'),
        ),
        "an index that knows more": ("says that", weight_map(lambda tree: tree.update(x=SHARD))),
        "an index that knows less": ("does not say so", weight_map(lambda tree: tree.pop(NORM))),
        "an index that names another shard": (
            "x: cannot be read: No such file",
            weight_map(lambda tree: tree.update({NORM: "x"})),
        ),
        "a path that leads up": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: "../x"})),
        ),
        "a path from the root": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: "/etc/passwd"})),
        ),
        "a path of two dots": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: ".."})),
        ),
        "a path of backslashes": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: "..\\x"})),
        ),
        "a shard that is a number": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: 5})),
        ),
        "a shard of no name": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: ""})),
        ),
        "a shard's name that ends early": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: "a\0b"})),
        ),
        "a shard's name that a terminal obeys": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: ESCAPES})),
        ),
        "a shard's name of half a character": (
            "is the name of a file",
            weight_map(lambda tree: tree.update({NORM: "\ud800"})),
        ),
        "a shard's name of 5,000 letters": (
            "cannot be read",
            weight_map(lambda tree: tree.update({NORM: "a" * 5000})),
        ),
        "no weights at all": (
            "no weights",
            lambda folder: [file.unlink() for file in folder.glob("model*")],
        ),
        "weights of PyTorch": (
            "a format that can carry code",
            lambda folder: [
                file.rename(folder / "pytorch_model.bin") for file in folder.glob("model*")
            ],
        ),
    },
)

TENSORS = kinds(
    "single",
    HEADERS,
    {
        "an unknown tensor": (
            "1 unknown (extra)",
            header(
                lambda tree: tree.update(
                    extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                )
            ),
        ),
        "a tensor under another name": ("1 missing", header(renamed(NORM, "norm"))),
        "a tensor of a layer that is none": (
            "1 unknown",
            header(renamed(UP, UP.replace("layers.0", "layers.00"))),
        ),
        "half an MTP layer": (
            "missing",
            header(renamed(COPY.replace("head.head", "head.norm"), "other")),
        ),
    },
)

VALUES = kinds(
    "single",
    (CONVERT, (*CONVERT, "--dtype", "float32"), ("load", "{source}")),
    {
        "NaN": (f"{UP} holds NaN", value(UP, np.nan)),
        "infinity": (f"{NORM} holds NaN or infinity", value(NORM, -np.inf)),
        "another dtype of the same size": ("I16", entry(dtype="I16")),
        "a copy that differs": ("differs from lm_head.weight", value(COPY, 0.5, 0)),
    },
)

SCALES = kinds(
    "fp8",
    (CONVERT, ("load", "{source}")),
    {
        "NaN in FP8": (f"{UP} holds NaN", value(UP, np.nan)),
        "a scale that is NaN": ("expected a positive number", value(f"{UP}_scale_inv", np.nan)),
        "a scale that is infinite": (
            "expected a positive number",
            value(f"{UP}_scale_inv", np.inf),
        ),
        "a scale that is zero": ("expected a positive number", value(f"{UP}_scale_inv", 0.0)),
        "a scale that is negative": ("expected a positive number", value(f"{UP}_scale_inv", -1.0)),
    },
)

WEIGHTS = HEADER + RANGES + SHARDS + TENSORS + VALUES + SCALES
