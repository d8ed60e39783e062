"""Adapters in the layout of PEFT, the library of that name: written, and read. Imports no jax.

adapter_config.json          the method and its settings
adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r],
                             with DoRA .lora_magnitude_vector [out]
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.adapters import Low, adaptable, adapted, merge, module_of
from dsjax.checkpoint.families import FP8, Tensor, tensors
from dsjax.checkpoint.peft_config import CONFIG, PeftSettings, read_peft_config
from dsjax.checkpoint.safetensors import DTYPES, Entry, read_header
from dsjax.checkpoint.source import Source
from dsjax.config_sft import LoraConfig
from dsjax.errors import UserError

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_SIDES = "lora_A.weight", "lora_B.weight"
_MAGNITUDE = "lora_magnitude_vector"
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = "F32", "F16", "BF16"


def peft_files(
    config: ModelConfig, lora: LoraConfig, lows: Mapping[str, Low], base: str
) -> dict[str, bytes]:
    """The two files of an adapter, by their names.

    Module names are ends of released ones, which tell `mlp.gate_proj` apart from an expert's.

    Args:
        lows: the adapter of each released weight that has one.
        base: the path of the weights that they belong to.
    """
    from safetensors.numpy import save

    modules = {
        module_of(tensor).split(".", 3)[3]
        for parts in adapted(config, lora.target_modules).values()
        for tensor in parts
    }
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    weights = {}
    for name, low in lows.items():
        for side, value in zip(_SIDES, (low.a, low.b), strict=True):
            weights[_spelled(name, side)] = np.ascontiguousarray(value)
    return {
        CONFIG: f"{json.dumps(described, indent=2)}\n".encode(),
        WEIGHTS: save(weights, metadata={"format": "pt"}),
    }


def read_peft(folder: Path, config: ModelConfig) -> dict[str, Low | Entry]:
    """The adapter of each released weight that has one, out of a folder that PEFT or we wrote.

    Of a module that was trained in addition (`modules_to_save`) it is the weight that replaces it.

    Raises:
        UserError: a file is missing or damaged, it is another method, or of another model.
    """
    settings = read_peft_config(folder)
    stored = _read_weights(folder)
    changes: dict[str, Low | Entry] = {}
    for parts in adaptable(config).values():
        for tensor in parts:
            low = _take_low(stored, tensor, settings, folder)
            if low is not None:
                changes[tensor.name] = low
    changes |= _take_modules(stored, config, settings)
    if stored:
        raise UserError(
            f"{folder / WEIGHTS}: {min(stored)} is of no layer of the model that can have an "
            "adapter; it is of another model, or adapts routed experts, embedding or head"
        )
    return changes


def _take_low(
    stored: dict[str, Entry], tensor: Tensor, settings: PeftSettings, folder: Path
) -> Low | None:
    """One weight's adapter, taken out of what is stored; None where it has none."""
    names = [_spelled(tensor.name, side) for side in (*_SIDES, _MAGNITUDE)]
    if not stored.keys() & set(names):
        return None
    a, b = (_floats(stored.pop(name, None), name, folder, 2) for name in names[:2])
    if (a.shape[1], b.shape[0]) != tensor.shape[::-1] or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{folder / WEIGHTS}: the adapter of {tensor.name} is {list(b.shape)} by "
            f"{list(a.shape)}, the weight {list(tensor.shape)}; it is of another model"
        )
    magnitude = None
    if settings.is_dora:
        magnitude = _floats(stored.pop(names[2], None), names[2], folder, 1)
        if magnitude.shape != tensor.shape[:1]:
            raise UserError(
                f"{folder / WEIGHTS}: {names[2]} is {list(magnitude.shape)}, the weight "
                f"{list(tensor.shape)}; it is of another model"
            )
    return Low(a, b, settings.scale(module_of(tensor), a.shape[0]), magnitude)


def _take_modules(
    stored: dict[str, Entry], config: ModelConfig, settings: PeftSettings
) -> dict[str, Entry]:
    """The weights of modules that were trained whole, taken out of what is stored."""
    taken = {}
    for tensor in tensors(config) if settings.modules_to_save else ():
        if not module_of(tensor).endswith(settings.modules_to_save):  # as PEFT finds them
            continue
        if config.tie_word_embeddings and tensor.name == _EMBEDDING:
            raise UserError(
                f"{settings.file}: modules_to_save={list(settings.modules_to_save)} is not "
                "supported for a model whose embedding and head are one: merge it with PEFT's "
                "merge_and_unload and convert the merged model"
            )
        if tensor.path.startswith("mtp."):
            continue
        found = stored.pop(f"{_PREFIX}{tensor.name}", None)
        if found is None or found.shape != tensor.shape or found.dtype not in _FLOATS:
            what = "is missing" if found is None else f"is {found.dtype} of {list(found.shape)}"
            raise UserError(
                f"{settings.file.with_name(WEIGHTS)}: {tensor.name} {what}; modules_to_save "
                f"promises floats of {list(tensor.shape)}"
            )
        taken[tensor.name] = found
    return taken


def with_adapter(source: Source, folder: Path, dtype: str | None) -> Source:
    """The same model with the adapters in a folder merged into its weights.

    Raises:
        UserError: as `read_peft`; or weights are stored in FP8, which a sum is not, and no dtype
            is asked for.
    """
    changes = read_peft(folder, source.config)
    if dtype is None and any(source.stored[name].dtype == FP8 for name in changes):
        raise UserError(
            f"{source.folder}: stored in FP8, which weights with an adapter added are not; choose "
            "--dtype bfloat16, or --dtype fp8 to quantize anew"
        )
    return dataclasses.replace(
        source,
        stored=merge(source.stored, source.parts, changes),
        adapters=(folder / CONFIG, folder / WEIGHTS),
    )


def _spelled(weight: str, side: str) -> str:
    return f"{_PREFIX}{weight.removesuffix('.weight')}.{side}"


def _read_weights(folder: Path) -> dict[str, Entry]:
    file, pickled = folder / WEIGHTS, folder / "adapter_model.bin"
    if not file.is_file() and pickled.is_file():
        raise UserError(f"{pickled}: a pickle; save the adapter anew with safe_serialization=True")
    return read_header(file)


def _floats(entry: Entry | None, name: str, folder: Path, rank: int) -> np.ndarray:
    if entry is None or len(entry.shape) != rank or entry.dtype not in _FLOATS:
        found = "is missing" if entry is None else f"is {entry.dtype} of {list(entry.shape)}"
        kind = "matrix" if rank == 2 else "vector"
        raise UserError(f"{folder / WEIGHTS}: {name} {found}; expected a {kind} of floats")
    flat = entry.read_flat(0, math.prod(entry.shape))
    return flat.astype(DTYPES["F32"]).reshape(entry.shape)
