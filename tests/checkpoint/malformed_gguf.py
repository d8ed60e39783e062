"""Kinds of malformed GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import test_gguf
from malformed import Spoil, cut, kinds, text

GGUF = "model.gguf"


def write_gguf(folder: Path) -> None:
    """A sound file, in a folder."""
    (folder / "gguf").mkdir()
    test_gguf.write(folder / "gguf" / GGUF, test_gguf.CONFIGS["llama"])


def gguf_bytes(place: Callable[[bytes], int], data: bytes) -> Spoil:
    """Other bytes at a place of the GGUF file."""

    def spoil(folder: Path) -> None:
        old = (folder / GGUF).read_bytes()
        at = place(old)
        (folder / GGUF).write_bytes(old[:at] + data + old[at + len(data) :])

    return spoil


def behind(name: str, more: int = 0) -> Callable[[bytes], int]:
    """The place of what follows a name."""
    return lambda data: data.index(name.encode()) + len(name) + more


def gguf_field(name: str, value: Any, kind: gguf.GGUFValueType) -> Spoil:
    """A GGUF file in which one field is another."""

    def spoil(folder: Path) -> None:
        original = gguf.GGUFWriter.add_key_value

        def add(self: Any, key: str, old: Any, vtype: Any, sub_type: Any = None) -> None:
            if key == name:
                original(self, key, value, kind)
            else:
                original(self, key, old, vtype, sub_type)

        (folder / GGUF).unlink()
        gguf.GGUFWriter.add_key_value = add
        try:
            test_gguf.write(folder / GGUF, test_gguf.CONFIGS["llama"])
        finally:
            gguf.GGUFWriter.add_key_value = original

    return spoil


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


INSPECT_GGUF = ("inspect", "{source}/model.gguf")
CONVERT_GGUF = ("convert", "{source}/model.gguf", "{out}")
U32, STR = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
UNREAD = "cannot be read as GGUF"

GGUFS = kinds(
    "gguf",
    (INSPECT_GGUF, CONVERT_GGUF),
    {
        "an empty file": (UNREAD, text(GGUF, "")),
        "another format": (UNREAD, text(GGUF, "GGML" + "\0" * 100)),
        "a file of four bytes": (UNREAD, text(GGUF, "GGUF")),
        "an unknown version": (UNREAD, gguf_bytes(lambda data: 4, struct.pack("<I", 99))),
        "2^63 tensors": (UNREAD, gguf_bytes(lambda data: 8, u64(1 << 63))),
        "2^63 fields": (UNREAD, gguf_bytes(lambda data: 16, u64(1 << 63))),
        "a name of 2^60 letters": (UNREAD, gguf_bytes(lambda data: 24, u64(1 << 60))),
        "a name of 2^64 - 1 letters": (UNREAD, gguf_bytes(lambda data: 24, u64((1 << 64) - 1))),
        "a list of 2^60 texts": (
            UNREAD,
            gguf_bytes(behind("tokenizer.ggml.tokens", 8), u64(1 << 60)),
        ),
        "a list of 2^60 numbers": (UNREAD, gguf_bytes(behind("ggml.token_type", 8), u64(1 << 60))),
        "a field of an unknown type": (
            UNREAD,
            gguf_bytes(behind("llama.block_count"), struct.pack("<I", 77)),
        ),
        "lists in lists": (
            UNREAD,
            text(
                GGUF,
                b"GGUF"
                + struct.pack("<IQQ", 3, 0, 1)
                + u64(1)
                + b"a"
                + struct.pack("<I", 9)
                + struct.pack("<IQ", 9, 1) * 50_000,
            ),
        ),
        "a tensor of 2^31 dimensions": (
            UNREAD,
            gguf_bytes(behind("output_norm.weight"), struct.pack("<I", 1 << 31)),
        ),
        "a tensor of 2^63 numbers": (
            UNREAD,
            gguf_bytes(behind("output_norm.weight", 4), u64(1 << 63)),
        ),
        "a tensor that is behind the file": (
            UNREAD,
            gguf_bytes(behind("output_norm.weight", 16), u64(1 << 40)),
        ),
        "a tensor of an unknown type": (
            UNREAD,
            gguf_bytes(behind("output_norm.weight", 12), struct.pack("<I", 999)),
        ),
        "a download that stopped": (UNREAD, cut(GGUF, -5000)),
        "a download that stopped early": (UNREAD, cut(GGUF, 500)),
        "no family": ("architecture", gguf_field("general.architecture", "gpt2", STR)),
        "a family that is a number": ("architecture 7", gguf_field("general.architecture", 7, U32)),
        "a text for a number": (
            "head_count' is '8', expected a number",
            gguf_field("llama.attention.head_count", "8", STR),
        ),
        "no heads": ("num_attention_heads=0", gguf_field("llama.attention.head_count", 0, U32)),
        "layers that are many": (
            "num_hidden_layers=4000000000",
            gguf_field("llama.block_count", 4 * 10**9, U32),
        ),
        "an epsilon that is a text": (
            "rms_epsilon' is 'small'",
            gguf_field("llama.attention.layer_norm_rms_epsilon", "small", STR),
        ),
        "tokens that are a number": ("vocab_size=0", gguf_field("tokenizer.ggml.tokens", 5, U32)),
        "merges that are a text": ("tokenizer", gguf_field("tokenizer.ggml.merges", "t h", STR)),
        "kinds of tokens that are a number": (
            "tokenizer",
            gguf_field("tokenizer.ggml.token_type", 3, U32),
        ),
        "a first token that is none": (
            "bos_token_id=4000",
            gguf_field("tokenizer.ggml.bos_token_id", 4000, U32),
        ),
        "a template that is a number": ("template", gguf_field("tokenizer.chat_template", 3, U32)),
    },
)
