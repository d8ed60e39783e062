"""DeepSeek written from the papers in plain numpy float64, one sequence at a time.

Slow and literal on purpose: loops over heads, groups, tokens and experts, rotary pairs as complex
numbers, weights looked up under their released names, a configuration as a plain mapping with the
released keys. It shares no line with the model that it judges.

DeepSeek-V3: arXiv:2412.19437. DeepSeek-V2: arXiv:2405.04434. YaRN: arXiv:2309.00071. Balance by
bias: arXiv:2408.15664.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]

LATENT_EPS = 1e-6


class Routed(NamedTuple):
    """Where one layer sent one sequence."""

    scores: np.ndarray
    """s, [S, E]."""
    biased: np.ndarray
    """s + b, or s where there is no bias, [S, E]."""
    gates: np.ndarray
    """What each expert's output is multiplied by, [S, E]; 0 where it was not chosen."""

    @property
    def chosen(self) -> np.ndarray:
        """Which experts each token went to, [S, E]."""
        return self.gates > 0


class Prediction(NamedTuple):
    """What the model makes of one sequence of S tokens."""

    hidden: np.ndarray
    """After the final norm, [S, D]."""
    logits: np.ndarray
    """Row i predicts token i + 1, [S, V]."""
    routed: list[Routed]
    """One for each expert layer."""
    mtp_logits: list[np.ndarray]
    """Depth k = 1, 2, ...: row i predicts token i + 1 + k, [S - k, V]."""
    mtp_routed: list[Routed]
    """One for each depth, over its S - k rows."""


def run(config: Config, weights: Weights, tokens: np.ndarray, positions: np.ndarray) -> Prediction:
    """The main model and every MTP depth over one sequence (V3 sections 2.1 and 2.2)."""
    weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    layers, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    head = weights["lm_head.weight"]
    x = weights["model.embed_tokens.weight"][tokens]
    routed = []
    for layer in range(layers):
        x, sent = transformer_block(config, _below(weights, f"model.layers.{layer}."), x, positions)
        if layer >= config["first_k_dense_replace"]:
            routed.append(sent)
    hidden = rms_norm(x, weights["model.norm.weight"], eps)

    mtp_logits, mtp_routed, previous = [], [], hidden
    for depth in range(1, config["num_nextn_predict_layers"] + 1):
        own = _below(weights, f"model.layers.{layers + depth - 1}.")
        ahead = weights["model.embed_tokens.weight"][tokens[depth:]]
        # The embedding comes first in the released weights; equation 21 prints it second.
        pair = [
            rms_norm(ahead, own["enorm.weight"], eps),
            rms_norm(previous[: len(ahead)], own["hnorm.weight"], eps),
        ]
        x = np.concatenate(pair, axis=1) @ own["eh_proj.weight"].T
        previous, sent = transformer_block(config, own, x, positions[: len(ahead)])
        mtp_logits.append(rms_norm(previous, own["shared_head.norm.weight"], eps) @ head.T)
        mtp_routed.append(sent)
    return Prediction(hidden, hidden @ head.T, routed, mtp_logits, mtp_routed)


def transformer_block(
    config: Config, own: Weights, x: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, Routed | None]:
    """Attention and feed-forward, each on a norm and added to what came in."""
    eps = config["rms_norm_eps"]
    normed = rms_norm(x, own["input_layernorm.weight"], eps)
    x = x + attention(config, _below(own, "self_attn."), normed, positions)
    normed = rms_norm(x, own["post_attention_layernorm.weight"], eps)
    mlp = _below(own, "mlp.")
    if "gate.weight" not in mlp:
        return x + swiglu(mlp, normed), None
    routed = route(config, mlp, normed)
    y = np.zeros_like(x)
    for token, expert in np.argwhere(routed.chosen):
        out = swiglu(_below(mlp, f"experts.{expert}."), normed[token])
        y[token] += routed.gates[token, expert] * out
    if config["n_shared_experts"]:
        y += swiglu(_below(mlp, "shared_experts."), normed)
    return x + y, routed


def attention(config: Config, own: Weights, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Multi-head latent attention, keys and values made for every head (V2 section 2.1)."""
    nope, rope, wide = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    heads = config["num_attention_heads"]
    if config["q_lora_rank"] is None:
        q = x @ own["q_proj.weight"].T
    else:
        c_q = rms_norm(x @ own["q_a_proj.weight"].T, own["q_a_layernorm.weight"], LATENT_EPS)
        q = c_q @ own["q_b_proj.weight"].T
    compressed = x @ own["kv_a_proj_with_mqa.weight"].T
    c_kv = rms_norm(
        compressed[:, : config["kv_lora_rank"]], own["kv_a_layernorm.weight"], LATENT_EPS
    )
    k_rope = rotary(config, compressed[:, config["kv_lora_rank"] :], positions)
    kv = c_kv @ own["kv_b_proj.weight"].T

    outputs = []
    for head in range(heads):
        q_head = q[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        kv_head = kv[:, head * (nope + wide) : (head + 1) * (nope + wide)]
        q_rope = rotary(config, q_head[:, nope:], positions)
        scores = (q_head[:, :nope] @ kv_head[:, :nope].T + q_rope @ k_rope.T) * scale(config)
        for i in range(len(x)):
            scores[i, i + 1 :] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        outputs.append(weights @ kv_head[:, nope:])
    return np.concatenate(outputs, axis=1) @ own["o_proj.weight"].T


def sharpness(factor: float, mscale: float) -> float:
    """YaRN's 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def scale(config: Config) -> float:
    """What scores are multiplied by: one over the root of the width, times m squared."""
    plain = 1 / math.sqrt(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    yarn = config["rope_scaling"]
    return plain if yarn is None else plain * sharpness(yarn["factor"], yarn["mscale_all_dim"]) ** 2


def rotary(config: Config, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Neighbours (2i, 2i + 1) are one complex number, turned by its angle."""
    yarn = config["rope_scaling"]
    amplitude = 1.0
    if yarn is not None:
        amplitude = sharpness(yarn["factor"], yarn["mscale"])
        amplitude /= sharpness(yarn["factor"], yarn["mscale_all_dim"])
    angles = np.outer(positions, frequencies(config))
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * amplitude * np.exp(1j * angles)
    out = np.empty_like(x)
    out[:, 0::2], out[:, 1::2] = turned.real, turned.imag
    return out


def frequencies(config: Config) -> np.ndarray:
    """Angle per position of each pair; YaRN slows the pairs that turn rarely (section 3.2)."""
    dim, theta, yarn = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    result = []
    for i in range(dim // 2):
        f = theta ** (-2 * i / dim)
        if yarn is not None:
            length = yarn["original_max_position_embeddings"]

            def pair_turning(times: float, length: int = length) -> float:
                return dim * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))

            low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
            high = min(math.ceil(pair_turning(yarn["beta_slow"])), dim - 1)
            ramp = min(max((i - low) / (high - low or 0.001), 0.0), 1.0)
            f = f / yarn["factor"] * ramp + f * (1 - ramp)
        result.append(f)
    return np.array(result)


def route(config: Config, mlp: Weights, x: np.ndarray) -> Routed:
    """Choose experts within the best groups (V3 section 2.1.2; V2 sections 2.1.4 and 2.2.1)."""
    logits = x @ mlp["gate.weight"].T
    if config["scoring_func"] == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    biased = scores + mlp.get("gate.e_score_correction_bias", 0.0)
    gates = np.zeros_like(scores)
    for token, steering in enumerate(biased):
        chosen = _best(steering, config["num_experts_per_tok"], _reachable(config, steering))
        total = sum(scores[token, i] for i in chosen) if config["norm_topk_prob"] else 1.0
        for i in chosen:
            gates[token, i] = scores[token, i] / total * config["routed_scaling_factor"]
    return Routed(scores, biased, gates)


def _reachable(config: Config, steering: np.ndarray) -> list[int]:
    """Experts of the `topk_group` best groups."""
    groups = np.split(np.arange(len(steering)), config["n_group"])
    counted = 2 if config["topk_method"] == "noaux_tc" else 1
    strength = [sum(sorted(steering[group])[-counted:]) for group in groups]
    kept = _best(np.array(strength), config["topk_group"], list(range(len(groups))))
    return [int(i) for g in kept for i in groups[g]]


def _best(values: np.ndarray, count: int, among: list[int]) -> list[int]:
    return sorted(among, key=lambda i: -values[i])[:count]


def balance_loss(config: Config, scores: np.ndarray) -> float:
    """sum_i f_i P_i of one sequence, without alpha (V3 equations 17 to 20)."""
    tokens, experts = scores.shape
    chosen = config["num_experts_per_tok"]
    total = 0.0
    for i in range(experts):
        among_best = sum(i in _best(row, chosen, list(range(experts))) for row in scores)
        f = experts / (chosen * tokens) * among_best
        p = sum(row[i] / sum(row) for row in scores) / tokens
        total += f * p
    return total


def max_violation(load: np.ndarray) -> float:
    """max_i load_i over the mean load, minus 1 (arXiv:2408.15664 section 3)."""
    return float(load.max() / (load.sum() / len(load)) - 1)


def updated_bias(bias: np.ndarray, load: np.ndarray, rate: float) -> np.ndarray:
    """Overloaded experts lose `rate`, underloaded ones gain it (arXiv:2408.15664 algorithm 1)."""
    mean = load.sum() / len(load)
    return np.array([b + rate * np.sign(mean - c) for b, c in zip(bias, load, strict=True)])


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x over its root mean square, times the weight (arXiv:1910.07467)."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def swiglu(own: Weights, x: np.ndarray) -> np.ndarray:
    """down(silu(gate x) * up x) (arXiv:2002.05202)."""
    gate = x @ own["gate_proj.weight"].T
    inner = gate / (1 + np.exp(-gate)) * (x @ own["up_proj.weight"].T)
    return inner @ own["down_proj.weight"].T


def _below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }
