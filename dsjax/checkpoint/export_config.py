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

SCALE_FORMAT = "scale_fmt"
"""How V3.1 and later say that scales are powers of two; of V3.1-Terminus some are not."""

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
    keys = [key for key in ("torch_dtype", "dtype") if key in tree] or ["torch_dtype"]
    return describe(tree | dict.fromkeys(keys, _TORCH[dtype]), fp8=dtype == FP8)


def describe(
    tree: dict[str, Any],
    *,
    fp8: bool,
    quantized_here: bool = False,
    powers_of_two: bool = True,
    mtp_layers: int | None = None,
) -> dict[str, Any]:
    """Make `config.json` describe the weights that are written.

    A `quantization_config` of FP8 in exactly this form is kept, with its `scale_fmt` and excluded
    modules. One that describes other weights, left by another tool or true only of the source, is
    removed.

    Args:
        tree: what `config.json` holds.
        fp8: whether there are FP8 weights.
        quantized_here: whether some of them were made anew: then the old description is of others.
        powers_of_two: whether every scale is one, as `scale_fmt: ue8m0` says.
        mtp_layers: how many there are; None leaves what the tree says.
    """
    tree = {key: value for key, value in tree.items() if key != "compression_config"}
    if not fp8:
        tree.pop("quantization_config", None)
    elif quantized_here or not _is_own_form(tree.get("quantization_config")):
        tree["quantization_config"] = QUANTIZATION
    elif not powers_of_two:
        own = tree["quantization_config"]
        tree["quantization_config"] = {k: v for k, v in own.items() if k != SCALE_FORMAT}
    if mtp_layers is not None and (tree.get("num_nextn_predict_layers") or 0) != mtp_layers:
        tree["num_nextn_predict_layers"] = mtp_layers
    return tree


def _is_own_form(described: Any) -> bool:
    """Whether this describes e4m3 with a scale for each block of 128 x 128."""
    return (
        isinstance(described, dict)
        and all(described.get(key, value) == value for key, value in QUANTIZATION.items())
        and {"quant_method", "weight_block_size"} <= described.keys()
    )


def to_bytes(tree: dict[str, Any]) -> bytes:
    """As the files have it."""
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
