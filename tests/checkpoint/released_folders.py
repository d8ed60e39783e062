"""Released folders of every family and dtype, with weights that exercise a model."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from reference.configs import CONFIGS, DENSE_CONFIGS, MOONLIGHT, V3
from reference.weights import random_weights
from safetensors.numpy import save_file

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.checkpoint.export_config import make_config, with_dtype
from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.checkpoint.safetensors import DTYPES, read_folder
from dsjax.numerics.fp8_host import quantize_into, scale_shape

Weights = dict[str, np.ndarray]

FAMILIES: dict[str, ModelConfig] = {
    "v3": CONFIGS["v3"],
    "two_depths": CONFIGS["two_depths_and_unequal_mscales"],
    "v2": CONFIGS["v2"],
    "v2_lite": CONFIGS["v2_lite"],
    "moonlight": CONFIGS["moonlight"],
    "kimi_k2": DeepSeekConfig(**MOONLIGHT | dict(model_type="kimi_k2", q_lora_rank=24)),
    "no_dense_layers": CONFIGS["no_shared_experts_no_dense_layers"],
} | {name: DENSE_CONFIGS[name] for name in ("llama3_tied", "qwen2", "qwen3_yarn")}

# Matrices of several blocks, most of them with partial ones at their edges, and of none too.
BLOCKS = DeepSeekConfig(
    **V3
    | dict(
        hidden_size=160,
        q_lora_rank=136,
        kv_lora_rank=132,
        qk_nope_head_dim=20,
        v_head_dim=24,
        intermediate_size=264,
        moe_intermediate_size=144,
    )
)
BLOCKS_DENSE = DENSE_CONFIGS["qwen3_yarn"].model_copy(
    update=dict(hidden_size=144, head_dim=36, intermediate_size=260)
)

CARRIED = {
    "generation_config.json": b'{"temperature": 0.6}\n',
    "tokenizer.json": '{"version": "1.0", "é": null}'.encode(),
    "tokenizer_config.json": b'{"chat_template":  "{{ messages }}"}',
    "chat_template.jinja": b"{{ bos_token }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "README.md": b"# A model\n",
}


def weights_of(config: ModelConfig, dtype: str) -> Weights:
    """Random weights as a release would store them in `dtype`, a name of safetensors."""
    plain = random_weights(config)
    weights: Weights = {}
    for tensor in tensors(config):
        value = plain[tensor.name]
        if tensor.kind == ROUTER_BIAS:
            weights[tensor.name] = value
        elif dtype == "F8_E4M3" and (scale := tensor.scale):
            weights[tensor.name], weights[scale[0]] = quantized(value, tensor.name)
        else:
            held = "BF16" if dtype == "F8_E4M3" else dtype
            weights[tensor.name] = value.astype(DTYPES[held])
    return weights


def quantized(value: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """FP8 whose scales no quantizer of ours would choose: recomputing them would show."""
    values = np.empty(value.shape, ml_dtypes.float8_e4m3fn)
    scales = np.empty(scale_shape(value.shape), np.float32)
    quantize_into(values, scales, value, name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return values, scales * rng.uniform(0.5, 2, scales.shape).astype(np.float32)


def write_released(
    folder: Path,
    config: ModelConfig,
    dtype: str,
    shards: int = 3,
    weights: Weights | None = None,
    **keys: Any,
) -> Weights:
    """Write a released folder and return its tensors; neighbours by name lie in other shards."""
    weights = weights_of(config, dtype) if weights is None else weights
    folder.mkdir(parents=True)
    tree = with_dtype(make_config(config), dtype) | keys
    (folder / "config.json").write_text(json.dumps(tree))
    for name, data in CARRIED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    write_shards(folder, weights, shards)
    return weights


def write_shards(folder: Path, weights: Weights, shards: int) -> None:
    """Shards and their index; neighbours by name lie in other shards."""
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::shards]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(folder: Path, weights: Weights) -> None:
    """The folder holds these tensors, bit by bit, and no others."""
    stored = read_folder(folder)
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        found = stored[name].read()
        assert (found.dtype, found.shape) == (weight.dtype, weight.shape), name
        assert found.tobytes() == weight.tobytes(), name


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
