"""Quantized weights of other makers: FP8 brought to DeepSeek's form, the rest refused by name.

DeepSeek's form is e4m3 with a float32 scale, which multiplies, for each block of 128 x 128, under
the name `weight_scale_inv`. Other makers' FP8 differs in up to three ways:

    scales in bfloat16, float16 or e8m0   widened to float32, which is exact
    another name, `weight_scale`          the same meaning: it multiplies
    another granularity                   a tensor, or blocks that hold whole ones of 128 x 128:
                                          repeated, exact. A row, or smaller blocks: this form has
                                          no place for them, so the weight is read as the float32
                                          product

Makers: Qwen (bfloat16 scales), vLLM and AutoFP8 (a scale a tensor), compressed-tensors, modelopt.
Scales of activations (`input_scale`) and of the cache are left out: neither is quantized here.
Imports no jax.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.families import FP8, Tensor
from dsjax.checkpoint.safetensors import InParts, Stored
from dsjax.errors import UserError
from dsjax.numerics.fp8_host import BLOCK

PLAIN = {"F64", "F32", "F16", "BF16"}
SCALE_NAMES = ("_scale_inv", "_scale")
EXACT_SCALES = {"F32", "BF16", "F16", "F8_E8M0"}

_ACTIVATION_SCALES = re.compile(
    r"\.((input|activation)_scale(_inv)?|output_scale|(q|k|v|kv|prob)_scale)$"
)
_FORMATS = {
    ".weight_scale_2": "NVFP4 (modelopt)",
    ".weight_packed": "compressed-tensors (pack-quantized)",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes (int8)",
    ".weight.absmax": "bitsandbytes (4-bit)",
    ".W_q": "HQQ",
    "_blocks": "MXFP4",
}
"""What the ends of tensors' names say of the format that they are in."""


@dataclass(frozen=True)
class BlockScales(InParts):
    """Scales in another dtype, or of larger blocks, as float32 of each block of 128 x 128."""

    entry: Stored
    block: tuple[int, int]
    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def file(self) -> Path:
        """Where they are stored, for messages."""
        return self.entry.file

    @property
    def nbytes(self) -> int:
        """What is read."""
        return self.entry.nbytes

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Scales `begin` to `end`, row by row."""
        found = _grid(self.entry)
        rows, columns = (
            np.arange(count) * BLOCK // size
            for count, size in zip(self.shape, self.block, strict=True)
        )
        return found[np.ix_(rows, columns)].reshape(-1)[begin:end]


@dataclass(frozen=True)
class WidenedTensor(InParts):
    """An FP8 weight with scales of smaller blocks, read as the float32 product."""

    entry: Stored
    scales: Stored
    block: tuple[int, int]
    dtype: str = "F32"

    @property
    def file(self) -> Path:
        """Where it is stored, for messages."""
        return self.entry.file

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        """What is read."""
        return self.entry.nbytes + self.scales.nbytes

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the file's order; whole rows are made."""
        width = self.shape[1]
        first, last = begin // width, -(-end // width)
        values = self.entry.read_flat(first * width, last * width).reshape(-1, width)
        rows = np.arange(first, last) // self.block[0]
        columns = np.arange(width) // self.block[1]
        scales = _grid(self.scales)
        if not ((scales > 0) & (scales < np.inf)).all():
            raise UserError(f"{self.file}: a scale is no positive number; fetch it again")
        product = values.astype(np.float32) * scales[np.ix_(rows, columns)]
        return product.reshape(-1)[begin - first * width : end - first * width]


def _grid(scales: Stored) -> np.ndarray:
    """Scales as float32 with two dimensions, whatever a single one or a column is stored as."""
    shape = (*scales.shape, 1, 1)[:2]
    return scales.read().astype(np.float32).reshape(shape)


def with_block_scales(
    expected: list[Tensor], stored: Mapping[str, Any], quantization: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Bring other makers' FP8 to DeepSeek's form.

    Args:
        expected: the model's tensors.
        stored: those of the files. What is not understood is left, for `match` to tell of.
        quantization: `quantization_config`, or nothing.

    Returns:
        The tensors, and a line for each thing that was done.
    """
    found: dict[str, Any] = {n: e for n, e in stored.items() if not _ACTIVATION_SCALES.search(n)}
    done = Counter[str]()
    if unused := len(stored) - len(found):
        done["scales of activations are left out: activations are not quantized here"] = unused
    for tensor in expected:
        entry = found.get(tensor.name)
        name = next((s for end in SCALE_NAMES if (s := tensor.name + end) in found), None)
        if entry is None or name is None or entry.dtype != FP8 or entry.shape != tensor.shape:
            continue
        scales = found[name]
        named = _named_block(quantization)
        if not quantization and name.endswith("_scale_inv"):  # DeepSeek's own name
            named = BLOCK, BLOCK
        block = _block(tensor.shape, scales.shape, named)
        if block is None or scales.dtype not in EXACT_SCALES:
            continue
        del found[name]
        if tensor.scale is None or any(
            size % BLOCK and size < whole for size, whole in zip(block, tensor.shape, strict=True)
        ):
            found[tensor.name] = WidenedTensor(entry, scales, block)
            done["FP8 weights with a scale a row, or for small blocks, are read as float32"] += 1
            continue
        own, own_shape = tensor.scale
        same = (scales.dtype, scales.shape) == ("F32", own_shape)
        found[own] = scales if same else BlockScales(scales, block, own_shape)
        if scales.dtype != "F32":
            done[f"scales in {scales.dtype} are widened to float32"] += 1
        if scales.shape != own_shape:
            done["scales of larger blocks are repeated for each block of 128 x 128"] += 1
    return found, [f"{count:,} {what}" for what, count in done.items()]


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], named: tuple[int, int] | None
) -> tuple[int, int] | None:
    """How many rows and columns share a scale; None where the shapes do not tell.

    Sizes that are named are insisted on: others could fit the shapes, and put scales on wrong rows.
    """
    if len(shape) != 2 or len(scales) > 2:
        return None
    grid = (*scales, 1, 1)[:2]
    for block in (named, (BLOCK, BLOCK)) if named is None else (named,):
        if block and grid == tuple(-(-n // size) for n, size in zip(shape, block, strict=True)):
            return block
    if named is not None or 0 in grid or any(n % g for n, g in zip(shape, grid, strict=True)):
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _named_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The sides of a block that a configuration names."""
    size = quantization.get("weight_block_size")
    groups = quantization.get("config_groups")
    if isinstance(groups, dict):
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)]
        size = next((w["block_structure"] for w in weights
                     if isinstance(w, dict) and w.get("block_structure")), size)  # fmt: skip
    good = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    return (size[0], size[1]) if isinstance(size, list) and good else None


# ---------------------------------------------------------------------------------------------
# Formats that are not read
# ---------------------------------------------------------------------------------------------


def check_format(
    expected: list[Tensor],
    stored: Mapping[str, Stored],
    quantization: Mapping[str, Any],
    folder: Path,
) -> list[str]:
    """Refuse quantized weights that cannot be read, by the name of their format.

    Args:
        expected: the model's tensors.
        stored: those of the files, FP8 already in DeepSeek's form.
        quantization: `quantization_config`, or nothing.
        folder: for messages.

    Returns:
        A line if config.json names a quantization that the weights are not in.

    Raises:
        UserError: naming the format, and what to do.
    """
    names = {tensor.name for tensor in expected}
    names |= {tensor.scale[0] for tensor in expected if tensor.scale}
    odd = [n for n, e in stored.items() if n not in names or e.dtype not in PLAIN | {FP8}]
    named = _unreadable(quantization)
    by_names = (what for name in odd for end, what in _FORMATS.items() if name.endswith(end))
    # Where config.json names no format, the names of odd tensors do.
    changed = [n for n, e in stored.items() if isinstance(e, BlockScales | WidenedTensor)]
    seen = odd or changed
    label = (named or (next(by_names, None) if odd else None)) if seen else None
    if label:
        raise UserError(
            f"{folder}: weights are quantized as {label}, which is not read ({seen[0]} is "
            f"{stored[seen[0]].dtype}); take the release in bfloat16 or FP8, or dequantize it with "
            "the library that made it, and save that"
        )
    fp8 = any(entry.dtype == FP8 for entry in stored.values())
    if quantization and not seen and (named or not fp8):
        held = Counter(e.dtype for e in stored.values()).most_common(1)[0][0]
        what = named or quantization.get("quant_method")
        return [f"quantization_config says {what}, the weights are {held}: it is passed over"]
    return []


def _unreadable(quantization: Mapping[str, Any]) -> str | None:
    """The name of a format that is not read; None of one that is, or that is not named."""
    method = quantization.get("quant_method")
    detail = quantization.get("format") or quantization.get("quant_algo")
    readable = {
        "fp8": True,
        "compressed-tensors": detail in ("float-quantized", "naive-quantized"),
        "modelopt": detail == "FP8",
    }
    if method is None or readable.get(method if isinstance(method, str) else "", False):
        return None
    bits = 4 if quantization.get("load_in_4bit") else quantization.get("bits")
    more = detail or (f"{bits}-bit" if isinstance(bits, int) else None)
    return f"{_printable(method)} ({_printable(more)})" if more else _printable(method)


def _printable(value: Any) -> str:
    """As it is where it is a short word, else spelled and cut."""
    word = isinstance(value, str) and value.isprintable() and len(value) < 40
    return value if word else repr(value)[:40]


def quantization_of(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of quantization, under either of its names."""
    found = tree.get("quantization_config") or tree.get("compression_config") or {}
    return found if isinstance(found, dict) else {}
