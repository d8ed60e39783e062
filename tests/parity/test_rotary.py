"""Rotary settings, in every spelling, of every family: what transformers computes, or a reason.

Compared are the angle of each pair, the factor on cos and sin, and the scale of the softmax, over a
grid; and logits of small models for some of it. Where DeepSeek's own code differs from transformers
it is followed, and the setting stands in `DEEPSEEK_DIFFERS`.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from dsjax.checkpoint.from_files import load_files
from dsjax.checkpoint.hf_config import parse_config
from dsjax.errors import UserError
from dsjax.model.rope import rotary_amplitude, rotary_frequencies, softmax_scale

from .models import dense, make_model, v2_config, v3_config

LENGTH, ORIGINAL, THETA = 4096, 1024, 5e4

COMMON: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=LENGTH,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    tie_word_embeddings=False,
)
MLA: dict[str, Any] = COMMON | dict(
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=32,
    v_head_dim=16,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.0,
)


class Family(NamedTuple):
    """A family's classes in transformers, and the keys of a small model."""

    config: Any
    rotary: Any
    attention: Any
    tree: dict[str, Any]


V3 = Family(
    DeepseekV3Config,
    modeling_deepseek_v3.DeepseekV3RotaryEmbedding,
    modeling_deepseek_v3.DeepseekV3Attention,
    MLA,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        LlamaConfig,
        modeling_llama.LlamaRotaryEmbedding,
        modeling_llama.LlamaAttention,
        COMMON | {"head_dim": 32},
    ),
    "qwen2": Family(
        Qwen2Config,
        modeling_qwen2.Qwen2RotaryEmbedding,
        modeling_qwen2.Qwen2Attention,
        COMMON | {"hidden_size": 128},
    ),
    "qwen3": Family(
        Qwen3Config,
        modeling_qwen3.Qwen3RotaryEmbedding,
        modeling_qwen3.Qwen3Attention,
        COMMON | {"head_dim": 32},
    ),
    "deepseek_v2": Family(
        DeepseekV2Config,
        modeling_deepseek_v2.DeepseekV2RotaryEmbedding,
        modeling_deepseek_v2.DeepseekV2Attention,
        MLA | {"topk_method": "greedy"},
    ),
    "deepseek_v3": V3,
    "kimi_k2": V3,
}
DEEPSEEK = {"deepseek_v2", "deepseek_v3", "kimi_k2"}

YARN: dict[str, Any] = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


def without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != key}


MSCALES: list[dict[str, Any]] = [
    {name: value for name, value in (("mscale", m), ("mscale_all_dim", a)) if value != "absent"}
    for m in ("absent", None, 0, 0.5, 1.0)
    for a in ("absent", None, 0, 0.5, 1.0)
]
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"kind": "default"},
    "linear": {"kind": "linear", "factor": 4.0},
    "linear by a fraction": {"kind": "linear", "factor": 2.5},
    "yarn without an original length": without(YARN, "original_max_position_embeddings"),
    "yarn, factor null": YARN | {"factor": None},
    "yarn, factor missing": without(YARN, "factor"),
    "yarn, factor below 1": YARN | {"factor": 0.5},
    "yarn, attention_factor": YARN | {"attention_factor": 0.5},
    "yarn, attention_factor and mscales": YARN
    | {"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, attention_factor null": YARN | {"attention_factor": None},
    "yarn, attn_factor": YARN | {"attn_factor": 0.878},
    "yarn, beta_fast": YARN | {"beta_fast": 16},
    "yarn, beta_slow": YARN | {"beta_slow": 2.0},
    "yarn, equal betas": YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
    "yarn, betas null": YARN | {"beta_fast": None, "beta_slow": None},
    "yarn, beta_fast zero": YARN | {"beta_fast": 0},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, not truncated, betas": YARN | {"truncate": False, "beta_fast": 16, "beta_slow": 2},
    "yarn, truncated": YARN | {"truncate": True},
    "yarn, partial_rotary_factor 1": YARN | {"partial_rotary_factor": 1.0},
    "yarn, partial_rotary_factor": YARN | {"partial_rotary_factor": 0.5},
    "llama3": LLAMA3,
    "llama3 without an original length": without(LLAMA3, "original_max_position_embeddings"),
    "llama3 without low_freq_factor": without(LLAMA3, "low_freq_factor"),
    "dynamic": {"kind": "dynamic", "factor": 4.0},
    "longrope": {"kind": "longrope", "factor": 4.0, "short_factor": [1.0] * 16,
                 "long_factor": [2.0] * 16, "original_max_position_embeddings": ORIGINAL},
    "proportional": {"kind": "proportional", "factor": 4.0},
    "unheard of": {"kind": "magic", "factor": 4.0},
} | {f"yarn, {mscale}": YARN | mscale for mscale in MSCALES}  # fmt: skip

NOT_COMPUTED = {"dynamic", "longrope", "proportional", "unheard of", "yarn, partial_rotary_factor"}
"""Refused here, in every family."""

BY_BOTH = {"yarn, factor missing", "llama3 without low_freq_factor", "unheard of"}
"""Of these transformers makes nothing either."""

DEEPSEEK_REFUSES = {
    "yarn without an original length",  # DeepSeek's code takes 4096, transformers the context's
    "llama3 without an original length",  # the same
    "yarn, beta_fast zero",  # DeepSeek's code divides by it; transformers takes 32 for it
}


def differs(mscales: dict[str, Any]) -> bool:
    """Whether DeepSeek's code takes another amplitude for these than transformers.

    Of mscales that are not both above zero DeepSeek's takes each as it stands (1 and 0 where it is
    absent); transformers takes neither, and 0.1 ln(factor) + 1 for the amplitude.
    """
    mscale, all_dim = mscales.get("mscale"), mscales.get("mscale_all_dim")
    if mscale and all_dim:
        return False
    return (1 if mscale is None else mscale, all_dim or 0) != (1, 0)


DEEPSEEK_DIFFERS = {f"yarn, {mscales}" for mscales in MSCALES if differs(mscales)}


def spelled(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `config.json` has, in every spelling."""
    kind, rest = settings["kind"], without(settings, "kind")
    beside = {"rope_theta": THETA}
    both = {"type": kind, "rope_type": kind} | rest
    trees: dict[str, dict[str, Any]] = {
        "rope_scaling.type": beside | {"rope_scaling": {"type": kind} | rest},
        "rope_scaling.rope_type": beside | {"rope_scaling": {"rope_type": kind} | rest},
        "both types": beside | {"rope_scaling": both},
        "rope_parameters": {"rope_parameters": {"rope_type": kind} | rest | beside},
        "rope_parameters, another theta beside": {"rope_theta": 100.0}
        | {"rope_parameters": {"rope_type": kind} | rest | beside},
        "rope_parameters, theta beside": beside | {"rope_parameters": {"rope_type": kind} | rest},
        "an original length beside": beside
        | {"rope_scaling": both, "original_max_position_embeddings": 2048},
    }
    if kind == "default":
        trees |= {
            "nothing": beside,
            "null": beside | {"rope_scaling": None},
            "an empty object": beside | {"rope_scaling": {}},
        }
    return trees


GRID = [(name, spelling) for name, some in SETTINGS.items() for spelling in spelled(some)]


class Rotation(NamedTuple):
    """What a family's attention does with positions."""

    frequencies: np.ndarray
    amplitude: float
    scale: float


def theirs(family: str, tree: dict[str, Any]) -> Rotation | None:
    """Of the family's own classes in transformers; None where they raise."""
    made = FAMILIES[family]
    try:
        config = made.config.from_dict(copy.deepcopy(tree))
        rotary = made.rotary(config)
        with torch.device("meta"):  # its weights are not needed
            attention = made.attention(config, 0)
    except (KeyError, TypeError):
        return None
    return Rotation(rotary.inv_freq.numpy(), rotary.attention_scaling, attention.scaling)


def ours(family: str, tree: dict[str, Any]) -> Rotation | None:
    """The same here; None where the configuration is refused."""
    try:
        config = parse_config(copy.deepcopy(tree) | {"model_type": family}, Path("config.json"))
    except UserError as error:
        assert "\n" not in str(error)
        return None
    return Rotation(rotary_frequencies(config), rotary_amplitude(config), softmax_scale(config))


def expected(family: str, name: str, spelling: str) -> str:
    """What the comparison must come to."""
    if name in BY_BOTH:
        return "refused by both"
    if name in NOT_COMPUTED:
        return "refused"
    if family in DEEPSEEK:
        beside = spelling == "an original length beside" and "original" in name
        if name in DEEPSEEK_REFUSES and not beside:
            return "refused, as DeepSeek's code differs"
        if name in DEEPSEEK_DIFFERS:
            return "differs, as DeepSeek's code does"
    return "equal"


def outcome(family: str, here: Rotation | None, there: Rotation | None) -> str:
    if here is None:
        return "refused" if there is not None else "refused by both"
    assert there is not None
    assert np.allclose(here.frequencies, there.frequencies, rtol=1e-6)
    assert np.isclose(here.scale, there.scale, rtol=1e-6)
    return "equal" if np.isclose(here.amplitude, there.amplitude, rtol=1e-6) else "differs"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_is_computed_as_in_transformers_or_refused(family: str) -> None:
    count = Counter[str]()
    for name, spelling in GRID:
        tree = FAMILIES[family].tree | spelled(SETTINGS[name])[spelling]
        found = outcome(family, ours(family, tree), theirs(family, tree))
        wanted = expected(family, name, spelling)
        assert wanted.partition(",")[0] == found, f"{name}, as {spelling}: {found}"
        count[wanted] += 1
    print(f"\n  {len(GRID)} cases: {', '.join(f'{n} {what}' for what, n in sorted(count.items()))}")
    assert count["equal"] > 100


def test_deepseeks_amplitude_is_that_of_its_own_code() -> None:
    """The formula of its `modeling_deepseek.py`, where transformers has another."""
    for mscales in MSCALES:
        rope = {"rope_scaling": without(YARN, "kind") | {"type": "yarn"} | mscales}
        found = ours("deepseek_v3", FAMILIES["deepseek_v3"].tree | {"rope_theta": THETA} | rope)
        assert found is not None
        wide, all_dim = (
            0.1 * (default if mscales.get(key) is None else mscales[key]) * np.log(4.0) + 1
            for key, default in (("mscale", 1), ("mscale_all_dim", 0))
        )
        assert np.isclose(found.amplitude, wide / all_dim)
        assert np.isclose(found.scale, (16 + 32) ** -0.5 * all_dim**2)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "mscales": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.4},
    "attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 0.6,
        "truncate": False,
    },
}
MODELS = {
    "llama": (LlamaForCausalLM, lambda rope: dense(LlamaConfig, rope, num_hidden_layers=1)),
    "qwen2": (Qwen2ForCausalLM, lambda rope: dense(Qwen2Config, rope, num_hidden_layers=1)),
    "qwen3": (Qwen3ForCausalLM, lambda rope: dense(Qwen3Config, rope, num_hidden_layers=1)),
    "deepseek_v2": (DeepseekV2ForCausalLM, lambda _: v2_config(lite=False)),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        lambda _: v3_config("narrow", low_rank=True, yarn=True, groups=False),
    ),
}


SOME = [
    *((family, "mscales") for family in MODELS),
    ("llama", "attention_factor"),
    ("deepseek_v3", "attention_factor"),
    ("qwen3", "linear"),
    ("deepseek_v2", "linear"),
]


@pytest.mark.parametrize(("family", "rope"), SOME)
def test_logits_agree(tmp_path: Path, family: str, rope: str) -> None:
    kind, make_config = MODELS[family]
    settings = ROPES[rope] | {"rope_theta": 100.0, "original_max_position_embeddings": 32}
    if rope == "linear":
        del settings["original_max_position_embeddings"]
    config = make_config(settings)
    config.rope_parameters = settings
    if family in DEEPSEEK:
        config.num_hidden_layers = 1
    model = make_model(kind, config)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 48), dtype=np.int32)
    with torch.no_grad():
        there = model(torch.from_numpy(tokens).long()).logits.numpy()
    here = np.asarray(jax.jit(lambda m, t: m(t).logits)(load_files(tmp_path), jnp.asarray(tokens)))
    assert np.abs(here - there).max() < 1e-4 * np.abs(there).max()
