"""Writing `config.json`: the inverse of `hf_config`, and what a change of dtype changes in one."""

from __future__ import annotations

import json
from typing import Any

from dsjax.architecture import DeepSeekConfig, ModelConfig, Section, YarnConfig
from dsjax.checkpoint.families import FP8
from dsjax.checkpoint.rotary_config import EXTENSIONS
from dsjax.numerics.fp8_host import BLOCK

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""The classes of the transformers library."""

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""What DeepSeek's releases say of their FP8."""

_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", FP8: "bfloat16"}


def make_config(config: ModelConfig) -> dict[str, Any]:
    """The released form of a model's configuration, which `read_config` reads as the same model."""
    tree = config.model_dump(exclude={"embedding_initializer_range"})
    if config.rope_scaling is not None:
        tree["rope_scaling"] = _rope_scaling(config, config.rope_scaling)
    tree |= {"architectures": [ARCHITECTURES[config.model_type]], "hidden_act": "silu"}
    if config.model_type != "qwen2":  # which has no such key, and biases all the same
        tree["attention_bias"] = False
    if isinstance(config, DeepSeekConfig):
        tree |= {"num_key_value_heads": config.num_attention_heads, "moe_layer_freq": 1}
    return tree


def _rope_scaling(config: ModelConfig, scaling: Section) -> dict[str, Any]:
    kind = next(name for name, made in EXTENSIONS.items() if isinstance(scaling, made))
    settings = scaling.model_dump()
    if isinstance(scaling, YarnConfig):
        # Not every reader knows these: they are written where they change something.
        for key in ("attention_factor", "truncate"):
            if settings[key] == YarnConfig.model_fields[key].default:
                del settings[key]
        if not isinstance(config, DeepSeekConfig) and not scaling.mscale_all_dim:
            del settings["mscale"], settings["mscale_all_dim"]
    # By both names: libraries of different years read one or the other.
    return settings | {"type": kind, "rope_type": kind}


def with_dtype(tree: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same configuration of weights that are stored as `dtype`, a name of safetensors.

    FP8 weights compute in bfloat16, and are described by `quantization_config`.
    """
    tree = dict(tree)
    keys = [key for key in ("torch_dtype", "dtype") if key in tree] or ["torch_dtype"]
    tree |= dict.fromkeys(keys, _TORCH[dtype])
    if dtype != FP8:
        tree.pop("quantization_config", None)
    else:
        tree.setdefault("quantization_config", QUANTIZATION)
    return tree


def to_bytes(tree: dict[str, Any]) -> bytes:
    """As the files have it."""
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
