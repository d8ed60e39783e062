"""DeepSeek-V3 of the transformers library, with random weights that exercise it, and as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsjax.checkpoint.huggingface import load_huggingface
from dsjax.model.transformer import DeepSeek

# Models this small lose more to waiting threads than they gain.
torch.set_num_threads(1)

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

# Every combination of the three switches; each shape sees each switch both on and off.
CASES = [
    ("wide" if (low_rank + yarn + groups) % 2 else "narrow", low_rank, yarn, groups)
    for low_rank in (True, False)
    for yarn in (True, False)
    for groups in (True, False)
]


class Pair(NamedTuple):
    """The same model in both libraries."""

    theirs: DeepseekV3ForCausalLM
    ours: DeepSeek
    folder: Path


def make_config(shape: str, low_rank: bool, yarn: bool, groups: bool) -> DeepseekV3Config:
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


def make_model(config: DeepseekV3Config, seed: int = 0) -> DeepseekV3ForCausalLM:
    """Norms 1 +- 0.2, router logits of spread 1, biases that often make s + b negative."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn_like(value)
            if "norm" in name:
                value.copy_(1 + 0.2 * noise)
            elif "e_score_correction_bias" in name:
                value.copy_(0.8 * noise)
            elif "embed_tokens" in name:
                value.copy_(noise)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)
    return model


@pytest.fixture(
    scope="package",
    params=CASES,
    ids=lambda case: "_".join(
        (
            case[0],
            "q_lora" if case[1] else "direct",
            "yarn" if case[2] else "rope",
            "groups" if case[3] else "one_group",
        )
    ),
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = make_model(make_config(*request.param))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return Pair(theirs, load_huggingface(folder), folder)


@pytest.fixture(scope="package", autouse=True)
def hasty_compiler() -> Iterator[None]:
    """These tests wait for the compiler, hardly for the program."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
