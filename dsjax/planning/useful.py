"""The work of a training step that counts as useful: model FLOPs, in the paper's count."""

from __future__ import annotations

import math
from typing import Any

from dsjax.architecture import DeepSeekConfig, ModelConfig
from dsjax.model.layers import variable_axes, variables


def flops_per_token(model: Any, config: ModelConfig, length: int) -> float:
    """Operations that training needs for one token of a row of `length` tokens.

        6 x (matrices that a token meets) + 3 x 2 x layers x heads x (d_qk + d_v) x length / 2

    forward once, backward twice; causal attention sees half of a row. The lookup in the embedding
    is no matrix product. DeepSeek-V3: 250.4e9 at 4,096 tokens, 281.2e9 at 8,192.

    Differs from the paper's count: nothing. MTP layers, recomputation and routing are not useful
    work in it.

    Args:
        model: a Transformer, abstract or not.
    """
    met = 0.0
    for name, variable in variables(model):
        tied = config.tie_word_embeddings
        if name.startswith("mtp.") or (name.startswith("embed.") and not tied):
            continue
        axes = variable_axes(variable)
        if sum(axis != "layers" for axis in axes) < 2:
            continue
        size = math.prod(variable.shape)
        if "expert" in axes and isinstance(config, DeepSeekConfig):
            size *= config.num_experts_per_tok / config.n_routed_experts
        met += size
    values = config.v_head_dim if isinstance(config, DeepSeekConfig) else config.qk_head_dim
    heads = config.num_hidden_layers * config.num_attention_heads
    return 6 * met + 3 * heads * (config.qk_head_dim + values) * length
