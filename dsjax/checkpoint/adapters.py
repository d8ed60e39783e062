"""Low-rank adapters (LoRA) beside the weights that they adapt, and merged into them. No jax.

A run with adapters holds them alone; its `init` has the weights under them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.families import ATTENTION, DENSE, FP8, SHARED, Tensor, tensors
from dsjax.checkpoint.safetensors import DTYPES, Entry, InParts
from dsjax.config_sft import LoraConfig
from dsjax.errors import UserError
from dsjax.numerics.fp8_host import check_scales, dequantize_into

ADAPTED = {ATTENTION, DENSE, SHARED}
"""What may have an adapter."""


def adaptable(config: ModelConfig) -> dict[str, list[Tensor]]:
    """The linear layers that may have adapters, by their paths, and the released weights of each.

    MTP layers, which no other library has, and routed experts, which are one array, have none.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors(config):
        if tensor.kind in ADAPTED and not tensor.path.startswith("mtp."):
            found[tensor.path.removesuffix(".weight")].append(tensor)
    return dict(found)


def adapted(config: ModelConfig, targets: Sequence[str] | None) -> dict[str, list[Tensor]]:
    """Those of them that have adapters.

    Args:
        targets: last parts of released module names, such as q_proj. None: those of attention, and
            of the feed-forward where there are no routed experts. PEFT 0.21 on transformers 5 takes
            an adapter of any gate_proj, up_proj or down_proj of DeepSeek's for one of the routed
            experts, and opens no other.

    Raises:
        UserError: the model has no such layer, or only routed experts by that name.
    """
    found = adaptable(config)
    if targets is None:
        kinds = {ATTENTION} if isinstance(config, DeepSeekConfig) else ADAPTED
        return {path: parts for path, parts in found.items() if parts[0].kind in kinds}
    known = {_target(parts[0]) for parts in found.values()}
    if unknown := sorted(set(targets) - known):
        raise UserError(
            f"lora.target_modules: the model has no linear layer {unknown[0]!r} outside of routed "
            f"experts and MTP; choose of {', '.join(sorted(known))}"
        )
    return {path: parts for path, parts in found.items() if _target(parts[0]) in targets}


def module_of(tensor: Tensor) -> str:
    """The released name of the layer that a weight belongs to."""
    return tensor.name.removesuffix(".weight")


def _target(tensor: Tensor) -> str:
    return module_of(tensor).rpartition(".")[2]


@dataclass(frozen=True)
class Low:
    """One layer's adapter, of a matrix as it is released: a [r, in], b [out, r]."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None
    """[out], of DoRA (arXiv:2402.09353): the norm that every row of the merged weight has."""

    def add_to(self, rows: np.ndarray, first: int) -> None:
        """Merge in place into rows of the weight, float32, the first of which is row `first`."""
        last = first + len(rows)
        rows += self.b[first:last] @ self.a * self.scale
        if self.magnitude is not None:
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            rows *= self.magnitude[first:last, None] / np.maximum(norms, np.finfo("f4").tiny)


def cut_adapters(
    config: ModelConfig, lora: LoraConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, Low]:
    """The adapter of every released weight that has one, out of the model's stacks.

    Args:
        arrays: each stack, float32, by its path: `dense_layers.attn.q_a.adapter.a`.
    """
    cut = {}
    for path, parts in adapted(config, lora.target_modules).items():
        for tensor in parts:
            a, b = (arrays[f"{path}.adapter.{side}"][tensor.index] for side in "ab")
            flat = a.reshape(lora.rank, -1), b.reshape(-1, lora.rank)
            cut[tensor.name] = Low(*flat, lora.alpha / lora.rank)
    return cut


@dataclass(frozen=True)
class _Changed(InParts):
    """A weight with other numbers than are stored, but otherwise like the stored tensor."""

    base: Any

    @property
    def file(self) -> Path:
        """Of the base."""
        path: Path = self.base.file
        return path

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it; a base in FP8 is bfloat16 once it is changed."""
        return "BF16" if self.base.dtype == FP8 else str(self.base.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        return tuple(self.base.shape)


@dataclass(frozen=True)
class Replaced(_Changed):
    """A weight that was trained whole, in the dtype of the stored tensor."""

    trained: Entry

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order."""
        return self.trained.read_flat(begin, end).astype(DTYPES[self.dtype])


@dataclass(frozen=True)
class Merged(_Changed):
    """A weight with its adapter added."""

    scales: Any
    """Of a base in FP8; else None."""
    low: Low

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order: added in float32, rounded once."""
        columns = self.shape[1]
        first, last = begin // columns, -(-end // columns)
        rows = self.base.read_flat(first * columns, last * columns).reshape(-1, columns)
        wide = rows.astype(np.float32) if self.scales is None else self._widened(rows, first)
        self.low.add_to(wide, first)
        flat = wide.astype(DTYPES[self.dtype]).reshape(-1)
        return flat[begin - first * columns : end - first * columns]

    def _widened(self, rows: np.ndarray, first: int) -> np.ndarray:
        where = str(self.file)
        scales = self.scales.read()
        check_scales(scales, (self.shape[0], self.shape[1]), where)
        out = np.empty(rows.shape, np.float32)
        dequantize_into(out, rows, scales, where, (first, 0))
        return out


def merge(
    stored: Mapping[str, Any], parts: list[Tensor], changes: Mapping[str, Low | Entry]
) -> dict[str, Any]:
    """Merge adapters into stored tensors, and put weights that were trained whole in their place.

    Args:
        stored: tensors by their released names.
        parts: the tensors of the model.
        changes: the adapter of each weight that has one, or the weight that replaces it.
    """
    merged = dict(stored)
    for tensor in parts:
        if (change := changes.get(tensor.name)) is None:
            continue
        base = stored[tensor.name]
        scales = merged.pop(tensor.scale[0]) if base.dtype == FP8 and tensor.scale else None
        if isinstance(change, Low):
            merged[tensor.name] = Merged(base, scales, change)
        else:
            merged[tensor.name] = Replaced(base, change)
    return merged
