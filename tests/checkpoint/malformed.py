"""Sound models, spoiled: every way in which one can be wrong that we could think of.

A kind names the model that it begins with, what is done to a copy, and what the refusal must say.
The kinds are in the files beside this one, each of its own part; here is how they are made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from released_folders import BLOCKS, FAMILIES, write_released

from dsjax.checkpoint.safetensors import INDEX, SINGLE, read_header
from dsjax.data.tokenizer import train_tokenizer

Spoil = Callable[[Path], object]

INSPECT, CONVERT = ("inspect", "{source}"), ("convert", "{source}", "{out}")
DRY_RUN, VERIFY = (*CONVERT, "--dry-run"), ("inspect", "--verify", "{source}")
HEADERS = (INSPECT, CONVERT)
"""What both have to see in headers."""

NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
COPY = "model.layers.3.shared_head.head.weight"
SHARD = "model-00001-of-00002.safetensors"

DEEP = 100_000
DIGITS = "9" * 5000
ESCAPES = "a\x1b[31mred\x1b[0m\u202e\x00\nb"
"""What a terminal would obey."""


@dataclass(frozen=True)
class Kind:
    """One way of being malformed; each of `commands` must refuse it in words that hold `says`."""

    name: str
    model: str
    says: str
    spoil: Spoil
    commands: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"{self.model}-{self.name}"


def kinds(
    model: str, commands: tuple[tuple[str, ...], ...], table: dict[str, tuple[str, Spoil]]
) -> list[Kind]:
    """A table of names, words and damages as kinds of one model."""
    return [Kind(name, model, says, spoil, commands) for name, (says, spoil) in table.items()]


def write_sound(folder: Path) -> None:
    """Released folders: of one file, of two shards, and of two shards in FP8."""
    write_released(folder / "sharded", FAMILIES["v3"], "BF16", shards=2)
    single = folder / "single"
    write_released(single, FAMILIES["v3"], "BF16", shards=1)
    (single / "model-00001-of-00001.safetensors").rename(single / SINGLE)
    (single / INDEX).unlink()
    write_released(folder / "fp8", BLOCKS, "F8_E4M3", shards=2)
    for name in ("single", "sharded", "fp8"):
        train_tokenizer(["a text"], 300).save(folder / name)
        (folder / name / "chat_template.jinja").unlink()
        shutil.rmtree(folder / name / "additional_chat_templates")
        (folder / name / "generation_config.json").write_text('{"top_p": 0.9}')


# ---------------------------------------------------------------------------------------------
# Makers
# ---------------------------------------------------------------------------------------------


def text(name: str, content: str | bytes) -> Spoil:
    """Another content of a file."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda folder: (folder / name).write_bytes(data)


def keys(name: str, **changes: Any) -> Spoil:
    """Other values of some keys of a JSON file; None leaves a key out."""

    def spoil(folder: Path) -> None:
        tree = json.loads((folder / name).read_text()) | changes
        left = {key: value for key, value in tree.items() if value is not None}
        (folder / name).write_text(json.dumps(left))

    return spoil


def config(**changes: Any) -> Spoil:
    """`keys` of config.json."""
    return keys("config.json", **changes)


def raw(key: str, value: str, name: str = "config.json") -> Spoil:
    """A value in a JSON file that json.dumps would not write."""

    def spoil(folder: Path) -> None:
        tree = json.loads((folder / name).read_text())
        rest = json.dumps({k: v for k, v in tree.items() if k != key})
        (folder / name).write_text(f'{{"{key}": {value}, {rest[1:]}')

    return spoil


def nested(name: str, opening: str = "[") -> Spoil:
    """A file whose first brackets never close."""
    return text(name, '{"a": ' + opening * DEEP)


def gone(name: str) -> Spoil:
    """No such file."""
    return lambda folder: (folder / name).unlink()


def is_folder(name: str) -> Spoil:
    """A folder in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def is_fifo(name: str) -> Spoil:
    """A pipe that nobody writes to: whoever opens it waits for ever."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def is_link(name: str, target: str) -> Spoil:
    """A link in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def cut(name: str, end: int) -> Spoil:
    """Only the first bytes of a file, or all but the last ones."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:end])


def large(name: str, size: int) -> Spoil:
    """A file of many bytes, which are a hole."""

    def spoil(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return spoil


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Any]]:
    """A header to change; it is written back, with the data behind it."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tree = json.loads(data[8:begin])
    yield tree
    written = json.dumps(tree).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[begin:])


def header(change: Callable[[dict[str, Any]], object], name: str = SINGLE) -> Spoil:
    """Another header before the same data."""

    def spoil(folder: Path) -> None:
        with opened(folder / name) as tree:
            change(tree)

    return spoil


def entry(**changes: Any) -> Spoil:
    """One tensor described otherwise."""
    return header(lambda tree: tree[NORM].update(changes))


def header_text(written: bytes, length: int | None = None, data: bytes = b"") -> Spoil:
    """A whole file of this header."""
    said = len(written) if length is None else length
    return text(SINGLE, said.to_bytes(8, "little") + written + data)


def weight_map(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """An index that says something else."""

    def spoil(folder: Path) -> None:
        tree = json.loads((folder / INDEX).read_text())
        change(tree["weight_map"])
        (folder / INDEX).write_text(json.dumps(tree))

    return spoil


def shifted(tree: dict[str, Any], by: int) -> None:
    begin, end = tree[NORM]["data_offsets"]
    tree[NORM]["data_offsets"] = [begin + by, end + by]


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree.update({new: tree.pop(old)})


def value(name: str, number: float, at: int = -1) -> Spoil:
    """One number of one tensor."""

    def spoil(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            if name in (entries := read_header(file)):
                begin, end = _place(file, name)
                array = entries[name].read().copy()
                array.flat[at] = number
                data = file.read_bytes()
                file.write_bytes(data[:begin] + array.tobytes() + data[end:])

    return spoil


def _place(file: Path, name: str) -> tuple[int, int]:
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:begin])[name]["data_offsets"]
    return begin + first, begin + last


def swapped(folder: Path) -> None:
    """Each of two shards under the other's name."""
    one, other = sorted(folder.glob("*.safetensors"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def many_large(folder: Path) -> None:
    """Files that each may travel along, but not together."""
    for i in range(30):
        (folder / f"{i}.dat").write_bytes(b"")
        os.truncate(folder / f"{i}.dat", 90_000_000)
