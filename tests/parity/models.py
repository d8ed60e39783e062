"""Models of the transformers library, of each family and switch, with weights that exercise it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ORIGINAL_LENGTH = 32
"""YaRN's; the tests' sequences are longer."""

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": dict(
        vocab_size=160,
        hidden_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-6,
    ),
    "wide": dict(
        vocab_size=224,
        hidden_size=64,
        num_hidden_layers=4,
        first_k_dense_replace=2,
        num_attention_heads=3,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=12,
        v_head_dim=14,
        intermediate_size=80,
        moe_intermediate_size=20,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        routed_scaling_factor=1.5,
        rms_norm_eps=1e-5,
    ),
}
YARN: dict[str, dict[str, Any]] = {
    "narrow": dict(factor=4.0, beta_fast=4.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    "wide": dict(factor=8.0, beta_fast=8.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.707),
}
QUERY_RANK = {"narrow": 24, "wide": 20}
DENSE: dict[str, Any] = dict(
    vocab_size=192,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_LENGTH,
)
QWEN3_YARN = dict(
    rope_type="yarn",
    rope_theta=100.0,
    factor=4.0,
    beta_fast=4.0,
    original_max_position_embeddings=ORIGINAL_LENGTH,
)


def v3_config(shape: str, low_rank: bool, yarn: bool, groups: bool) -> DeepseekV3Config:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 100.0}
    if yarn:
        rope |= YARN[shape] | {
            "rope_type": "yarn",
            "original_max_position_embeddings": ORIGINAL_LENGTH,
        }
    heads = SHAPES[shape]["num_attention_heads"]
    config = DeepseekV3Config(
        **SHAPES[shape],
        num_key_value_heads=heads,
        q_lora_rank=QUERY_RANK[shape] if low_rank else None,
        n_group=4 if groups else 1,
        topk_group=2 if groups else 1,
        rope_parameters=rope,
        max_position_embeddings=int(ORIGINAL_LENGTH * YARN[shape]["factor"]),
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def v2_config(*, lite: bool) -> DeepseekV2Config:
    """V2 with both mscales at 0.707, or V2-Lite, greedy and without q_lora."""
    shape = {k: v for k, v in SHAPES["narrow"].items()} | {"n_shared_experts": 2}
    rope = YARN["narrow"] | {"mscale": 0.707, "mscale_all_dim": 0.707}
    rope |= {"rope_type": "yarn", "original_max_position_embeddings": ORIGINAL_LENGTH}
    config = DeepseekV2Config(
        **shape | {"routed_scaling_factor": 1.0 if lite else 16.0},
        num_key_value_heads=shape["num_attention_heads"],
        q_lora_rank=None if lite else QUERY_RANK["narrow"],
        topk_method="greedy" if lite else "group_limited_greedy",
        n_group=1 if lite else 4,
        topk_group=1 if lite else 2,
        rope_parameters=rope | {"rope_theta": 100.0},
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._experts_implementation = "eager"
    return config


def moonlight_config() -> DeepseekV3Config:
    """Moonlight's switches: no q_lora, one group, no YaRN, another base and eps."""
    config = v3_config("narrow", low_rank=False, yarn=False, groups=False)
    config.rms_norm_eps = 1e-5
    config.n_shared_experts = 2
    config.rope_parameters["rope_theta"] = 50000.0
    return config


def kimi_config() -> DeepseekV3Config:
    """Kimi-K2's: q_lora, one dense layer, many experts in one group, YaRN."""
    config = v3_config("narrow", low_rank=True, yarn=True, groups=False)
    config.n_routed_experts = 24
    config.routed_scaling_factor = 2.827
    return config


def dense(kind: Any, rope: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A configuration of a dense family."""
    rope = rope or {"rope_type": "default", "rope_theta": 100.0}
    return kind(**DENSE | changes, rope_parameters=rope)


V3_CASES = [
    ("wide" if (low_rank + yarn + groups) % 2 else "narrow", low_rank, yarn, groups)
    for low_rank in (True, False)
    for yarn in (True, False)
    for groups in (True, False)
]
"""Every combination of the three switches; each shape sees each switch both on and off."""


def _name(shape: str, low_rank: bool, yarn: bool, groups: bool) -> str:
    switches = (
        "q_lora" if low_rank else "direct",
        "yarn" if yarn else "rope",
        "groups" if groups else "one_group",
    )
    return "_".join(("v3", shape, *switches))


CASES: dict[str, tuple[Any, Callable[[], Any]]] = {
    _name(*case): (DeepseekV3ForCausalLM, partial(v3_config, *case)) for case in V3_CASES
} | {
    "v2": (DeepseekV2ForCausalLM, partial(v2_config, lite=False)),
    "v2_lite": (DeepseekV2ForCausalLM, partial(v2_config, lite=True)),
    "moonlight": (DeepseekV3ForCausalLM, moonlight_config),
    "kimi_k2": (DeepseekV3ForCausalLM, kimi_config),
    "llama": (LlamaForCausalLM, partial(dense, LlamaConfig)),
    "llama3": (
        LlamaForCausalLM,
        partial(dense, LlamaConfig, LLAMA3, tie_word_embeddings=True),
    ),
    "qwen2": (Qwen2ForCausalLM, partial(dense, Qwen2Config, num_key_value_heads=3)),
    "qwen3": (Qwen3ForCausalLM, partial(dense, Qwen3Config, QWEN3_YARN, head_dim=16)),
}
"""A class of the transformers library, and what makes its configuration."""


SEEDS = {"v2_lite": 5, "llama3": 5}
"""Other than 0, from which these two say few different tokens."""


def make_model(kind: Any, config: Any, seed: int = 0) -> Any:
    """Norms 1 +- 0.2, router logits of spread 1, biases that often make s + b negative."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn_like(value)
            if "norm" in name:
                value.copy_(1 + 0.2 * noise)
            elif "bias" in name:
                value.copy_((0.3 if "proj" in name else 0.8) * noise)
            elif "embed_tokens" in name:
                value.copy_(noise)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)
    return model
