"""What a conversion will do, tensor by tensor and file by file, from headers alone. No jax."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dsjax.checkpoint.export_config import (
    SCALE_FORMAT,
    describe,
    make_config,
    to_bytes,
    with_dtype,
)
from dsjax.checkpoint.families import FP8, ROUTER_BIAS, Tensor
from dsjax.checkpoint.quantized import quantization_of
from dsjax.checkpoint.safetensors import INDEX, SINGLE, Stored
from dsjax.checkpoint.source import Source
from dsjax.checkpoint.streams import QUANTIZE, Item
from dsjax.checkpoint.tables import human
from dsjax.checkpoint.weights_folder import (
    CONFIG,
    RELEASED,
    SCALE,
    TOKENIZER,
    WEIGHTS,
    array_header,
    array_shapes,
    chunk_key,
    chunk_stack,
    orbax_files,
    stack_of,
)
from dsjax.errors import UserError
from dsjax.places import ObjectPath
from dsjax.small_files import MAX_BYTES, parse_json, read_small

HF, DSJAX = "hf", "dsjax"
FORMATS = (DSJAX, HF)

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "fp8": FP8}

SHARD_BYTES = 2_000_000_000
"""What a shard takes at most, unless one tensor takes more. Smaller than DeepSeek's 4.3 GB: what is
not finished when a conversion is killed is done again."""

_CONVERTED = ("BF16", "F16", "F32", FP8)
_OF_TOKENIZER = re.compile(
    r"tokeniz|generation_config|chat_template|special_tokens_map|added_tokens|additional_chat_templates/"
    r"|vocab\.|merges\.txt|\.(model|tiktoken)$"
)


@dataclass(frozen=True, slots=True)
class Output:
    """A file that will be written, `nbytes` with its header."""

    path: str
    header: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """Files that are written together, front to back: scales go into the last of them."""

    outputs: tuple[Output, ...]
    items: tuple[Item, ...]

    @property
    def bytes_in(self) -> int:
        """What is read for it."""
        return sum(item.bytes_in for item in self.items)

    @property
    def bytes_out(self) -> int:
        """What is written for it."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class Plan:
    """A conversion: jobs, small files as they will be, and what must be the same in the source."""

    jobs: list[Job]
    files: dict[str, bytes]
    repeats: list[tuple[Tensor, Stored, Stored]]
    leaves: dict[str, dict[str, Any]]

    @property
    def items(self) -> Iterator[Item]:
        """Every tensor that is written."""
        return (item for job in self.jobs for item in job.items)

    @property
    def bytes_in(self) -> int:
        """What is read, repeats that are only compared included."""
        compared = sum(one.nbytes + other.nbytes for _, one, other in self.repeats)
        return compared + sum(job.bytes_in for job in self.jobs)

    @property
    def bytes_out(self) -> int:
        """What is written."""
        return sum(map(len, self.files.values())) + sum(job.bytes_out for job in self.jobs)


def make_plan(source: Source, to: str, dtype: str | None) -> Plan:
    """Plan a conversion; `dtype` is one of `DTYPE_NAMES`, or None to keep what is stored.

    Raises:
        UserError: tensors are stored in ways that cannot be converted; it tells of all of them.
    """
    items = [_item(tensor, source, dtype) for tensor in source.parts]
    _check(items, source, stacked=to == DSJAX)
    carried = _carried(source, items, dtype, to)
    if to == HF:
        jobs, index = _shards(items)
        return Plan(jobs, carried | index, [], {})
    own = [item for item in items if not item.tensor.repeats]
    jobs, files, leaves = _chunks(own)
    tree = source.config.model_dump()
    files[CONFIG] = yaml.safe_dump(tree, sort_keys=False).encode()
    return Plan(jobs, files | carried, _repeats(source), leaves)


def _item(tensor: Tensor, source: Source, dtype: str | None) -> Item:
    stored = source.stored[tensor.name]
    quantized = stored.dtype == FP8 and tensor.scale
    scales = source.stored[tensor.scale[0]] if quantized and tensor.scale else None
    return Item(tensor, stored, scales, _written_dtype(tensor, stored, dtype))


def _written_dtype(tensor: Tensor, stored: Stored, dtype: str | None) -> str:
    """Router biases are float32; in FP8 what a release has in FP8, and the rest in bfloat16."""
    if dtype is None:
        return stored.dtype
    if tensor.kind == ROUTER_BIAS:
        return "F32"
    wanted = DTYPE_NAMES[dtype]
    return "BF16" if wanted == FP8 and tensor.scale is None else wanted


def _check(items: list[Item], source: Source, *, stacked: bool) -> None:
    """Tell of everything that cannot be converted, at once."""
    problems = [
        f"{item.tensor.name} is {item.source.dtype}, expected one of {', '.join(_CONVERTED)}"
        for item in items
        if item.source.dtype not in _CONVERTED
    ]
    for item in items:
        if item.source.dtype == FP8 and item.scales is None:
            problems.append(f"{item.tensor.name} is {FP8} and has no scales")
        if item.scales and item.scales.dtype != "F32":
            problems.append(f"the scales of {item.tensor.name} are {item.scales.dtype}, not F32")
    if stacked:
        for path, group in _grouped(items).items():
            found = {item.dtype: item.tensor.name for item in group}
            if path and len(found) > 1:
                both = " and ".join(f"{name} as {dtype}" for dtype, name in sorted(found.items()))
                problems.append(f"one array, stored in two ways: {both}; choose one by --dtype")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source.folder}: {'; '.join(problems[:3])}{more}")


def _repeats(source: Source) -> list[tuple[Tensor, Stored, Stored]]:
    """What the MTP layer shares, and what the files say that it is."""
    found = []
    for tensor in source.parts:
        if tensor.repeats:
            copy, original = source.stored[tensor.name], source.stored[tensor.repeats]
            if copy is not original:
                found.append((tensor, copy, original))
    return found


def _grouped(items: Iterable[Item]) -> dict[str, list[Item]]:
    grouped: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        grouped[item.tensor.path].append(item)
    return grouped


# ---------------------------------------------------------------------------------------------
# A released folder
# ---------------------------------------------------------------------------------------------


def _shards(items: list[Item]) -> tuple[list[Job], dict[str, bytes]]:
    """Shards layer by layer, and their index if they are several."""
    groups: list[list[Item]] = [[]]
    room = SHARD_BYTES
    for item in sorted(items, key=_layer):
        nbytes = item.value_bytes + item.scale_bytes
        if groups[-1] and nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(item)
        room -= nbytes
    total = len(groups)
    names = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    if total == 1:
        names = [SINGLE]
    jobs = [_shard(name, group) for name, group in zip(names, groups, strict=True)]
    if total == 1:
        return jobs, {}
    weight_map = {
        name: job.outputs[0].path for job in jobs for item in job.items for name in _written(item)
    }
    size = sum(item.value_bytes + item.scale_bytes for item in items)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return jobs, {INDEX: to_bytes(index)}


def _layer(item: Item) -> float:
    """Embedding first, final norm and head last, layers in between."""
    found = re.match(r"model\.layers\.(\d+)\.", item.tensor.name)
    if found:
        return int(found[1])
    return -1 if item.tensor.name.startswith("model.embed") else math.inf


def _written(item: Item) -> Iterator[str]:
    yield item.tensor.name
    if item.scale_bytes and item.tensor.scale:
        yield item.tensor.scale[0]


def _shard(name: str, items: list[Item]) -> Job:
    """One safetensors file; its numbers begin at a multiple of eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes

    for item in items:
        add(item.tensor.name, item.dtype, item.tensor.shape, item.value_bytes)
        if item.scale_bytes and item.tensor.scale:
            add(item.tensor.scale[0], "F32", item.tensor.scale[1], item.scale_bytes)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    return Job((Output(name, begin, len(begin) + end),), tuple(items))


# ---------------------------------------------------------------------------------------------
# Weights as dsjax keeps them
# ---------------------------------------------------------------------------------------------


def _chunks(
    items: list[Item],
) -> tuple[list[Job], dict[str, bytes], dict[str, dict[str, Any]]]:
    """A job for each chunk of each array, with the chunk of its scales; headers; descriptions."""
    grouped = _grouped(items)
    quantized = {path for path, group in grouped.items() if group[0].dtype == FP8}
    tensors = {path: [item.tensor for item in group] for path, group in grouped.items()}
    shapes = dict(array_shapes(tensors, quantized))
    jobs: list[Job] = []
    files = {f"{WEIGHTS}/{name}": data for name, data in orbax_files(shapes).items()}
    leaves: dict[str, dict[str, Any]] = {}
    for path, group in grouped.items():
        stack = stack_of(tensors[path])
        chunk = chunk_stack(stack, group[0].value_bytes)
        jobs += _jobs(path, group, stack, chunk)
        arrays = {path: group[0].dtype}
        if path in quantized:
            arrays[f"{path}{SCALE}"] = "F32"
        for name, dtype in arrays.items():
            files[f"{WEIGHTS}/{name}/.zarray"] = array_header(shapes[name], chunk, dtype)
            leaves[name] = {"shape": list(shapes[name]), "dtype": dtype}
    return jobs, files, leaves


def _jobs(
    path: str, group: list[Item], stack: tuple[int, ...], chunk: tuple[int, ...]
) -> Iterator[Job]:
    """The chunks of one array, one after the other; items come in the order of the stack."""
    items = {item.tensor.index: item for item in group}
    starts = [range(0, size, step) for size, step in zip(stack, chunk, strict=True)]
    for start in product(*starts):
        inside = [range(s, s + step) for s, step in zip(start, chunk, strict=True)]
        mine = tuple(items[index] for index in product(*inside))
        first = mine[0]
        key = chunk_key(start, chunk, len(first.tensor.inner))
        outputs = [Output(f"{WEIGHTS}/{path}/{key}", b"", sum(i.value_bytes for i in mine))]
        if first.scale_bytes and first.tensor.scale:
            key = chunk_key(start, chunk, len(first.tensor.scale[1]))
            name = f"{WEIGHTS}/{path}{SCALE}/{key}"
            outputs.append(Output(name, b"", sum(i.scale_bytes for i in mine)))
        yield Job(tuple(outputs), mine)


# ---------------------------------------------------------------------------------------------
# What travels along
# ---------------------------------------------------------------------------------------------


def _carried(source: Source, items: list[Item], dtype: str | None, to: str) -> dict[str, bytes]:
    """Tokenizer, templates and settings as they are; `config.json` too where all of it stays true.

    Without a dtype nothing becomes untrue but a quantization that the weights are not in, and MTP
    layers that are not there.
    """
    files = _read_carried(source.carried) | source.made
    config = files.get("config.json")
    fp8 = any(item.dtype == FP8 for item in items)
    if config is not None:
        found = parse_json(config, str(source.carried["config.json"]))
        tree = found if dtype is None else with_dtype(found, DTYPE_NAMES[dtype])
        says_powers = SCALE_FORMAT in quantization_of(found)
        tree = describe(
            tree,
            fp8=fp8,
            powers_of_two=not says_powers or _are_powers_of_two(items),
            quantized_here=any(item.step == QUANTIZE for item in items),
            mtp_layers=source.config.num_nextn_predict_layers,
        )
        if tree != found:
            files["config.json"] = to_bytes(tree)
    elif to == HF:
        held = FP8 if fp8 else items[0].dtype  # the embedding's
        files["config.json"] = to_bytes(with_dtype(make_config(source.config), held))
    if to == HF:
        return files
    homes = {name: TOKENIZER if _OF_TOKENIZER.search(name) else RELEASED for name in files}
    return {f"{homes[name]}/{name}": data for name, data in files.items()}


def _are_powers_of_two(items: list[Item]) -> bool:
    """Whether every scale that is carried is one. In a bucket they are too many requests to ask."""
    for item in items:
        if item.scales is None or isinstance(item.scales.file, ObjectPath):
            continue
        scales = item.scales.read_flat(0, math.prod(item.scales.shape))
        if (scales.view(np.uint32) & 0x7F_FFFF).any():  # the mantissa
            return False
    return True


def _read_carried(carried: dict[str, Path]) -> dict[str, bytes]:
    """Their contents, which together are as small as a single small file."""
    files: dict[str, bytes] = {}
    left = MAX_BYTES
    for name, file in carried.items():
        if (size := file.stat().st_size) > left:
            raise UserError(
                f"{file}: {human(size)}, too large for a file that holds no weights, where all of "
                f"them take at most {human(MAX_BYTES)}; move it away"
            )
        files[name] = read_small(file)
        left -= len(files[name])
    return files
