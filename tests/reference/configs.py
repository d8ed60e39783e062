"""Small configurations that throw every switch of FACTS' families, one shape for all."""

from __future__ import annotations

from typing import Any

from dsjax.architecture import DeepSeekConfig, DenseConfig, LinearConfig, Llama3Config, YarnConfig

YARN = YarnConfig(
    factor=4.0,
    # Sequences of the tests are longer than this, and pairs fall before, on and after the ramp.
    original_max_position_embeddings=32,
    beta_fast=4.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)

V3: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    max_position_embeddings=128,
    num_attention_heads=8,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_theta=50.0,
    rope_scaling=YARN,
    first_k_dense_replace=1,
    intermediate_size=48,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
V2: dict[str, Any] = V3 | dict(
    model_type="deepseek_v2",
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
    n_shared_experts=2,
    num_nextn_predict_layers=0,
    rope_scaling=YARN.model_copy(update={"mscale": 0.707, "mscale_all_dim": 0.707}),
)
MOONLIGHT: dict[str, Any] = V3 | dict(
    q_lora_rank=None,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    n_group=1,
    topk_group=1,
    n_shared_experts=2,
    num_nextn_predict_layers=0,
)

CONFIGS: dict[str, DeepSeekConfig] = {
    name: DeepSeekConfig(**values)
    for name, values in {
        "v3": V3,
        "two_depths_and_unequal_mscales": V3
        | dict(num_nextn_predict_layers=2)
        | dict(rope_scaling=YARN.model_copy(update={"mscale_all_dim": 0.707})),
        "v2": V2,
        "v2_lite": V2
        | dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)
        | dict(routed_scaling_factor=1.0),
        "moonlight": MOONLIGHT,
        "no_shared_experts_no_dense_layers": V3
        | dict(n_shared_experts=0, first_k_dense_replace=0, num_nextn_predict_layers=0),
        "only_dense_layers": V3 | dict(first_k_dense_replace=3),
    }.items()
}

DENSE: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    max_position_embeddings=128,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=50.0,
    intermediate_size=48,
)
DENSE_CONFIGS: dict[str, DenseConfig] = {
    "llama3_tied": DenseConfig(
        model_type="llama",
        tie_word_embeddings=True,
        rope_scaling=Llama3Config(
            factor=8.0,
            original_max_position_embeddings=32,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        **DENSE,
    ),
    "qwen2": DenseConfig(model_type="qwen2", **DENSE),
    "qwen3_yarn": DenseConfig(
        model_type="qwen3",
        rope_scaling=YARN.model_copy(update={"mscale_all_dim": 0.5}),
        **DENSE,
    ),
    "llama_linear": DenseConfig(
        model_type="llama",
        rope_scaling=LinearConfig(rope_type="linear", factor=4.0),
        **DENSE,
    ),
}
