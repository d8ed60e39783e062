"""Tokens per second of one training step on a CPU: dsjax beside transformers.

    python benchmarks/train_step.py            needs the `parity` extra; some five minutes

Both train the same 81M-parameter DeepSeek-V3 (no MTP, float32, two threads) on the same tokens with
AdamW and clipping. transformers runs each of its attention and expert backends, and the best one
counts. The two take turns; medians are compared. Prints one table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dsjax.config import load_model_config, load_run_config
from dsjax.training.step import Batch, Knobs, init_state, make_train_step

THREADS = 2
ATTENTION = ("sdpa", "eager")
EXPERTS = ("eager", "grouped_mm")
"""Not `batched_mm`: it copies a matrix for every (token, choice) pair, 18 GB here."""


def dsjax_step(tokens: np.ndarray) -> Callable[[], float]:
    """One jitted, donated training step on `tokens` [batch, seq]; returns its loss."""
    model = load_model_config("cpu-81m")
    config = load_run_config(
        "cpu-tiny",
        [f"data.sequence_length={tokens.shape[1]}", "training.loss_chunk=512"],
    ).model_copy(update={"model": model})
    state = jax.jit(lambda: init_state(config))()
    step = jax.jit(make_train_step(config), donate_argnums=0)
    batch = Batch(jnp.asarray(tokens)[None], jnp.ones_like(tokens)[None])
    knobs = Knobs(jnp.float32(1e-4), jnp.float32(0.3), jnp.float32(1e-3))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, jnp.int32(1), knobs)
        return float(metrics.sums.loss)

    return run


def transformers_step(tokens: np.ndarray, attention: str, experts: str) -> Callable[[], float]:
    """The same step in transformers: forward, backward, clip, AdamW."""
    fields = load_model_config("cpu-81m").model_dump()
    fields.pop("model_type")
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields.pop("rope_scaling")
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    config = DeepseekV3Config(**fields, rope_parameters=rope, use_cache=False)
    config._attn_implementation = attention
    config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def run() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def seconds(run: Callable[[], float]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def matmul_peak() -> float:
    """float32 FLOP/s of a large product in XLA, the limit that both are held against."""
    a = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = min(seconds(lambda: product(a).block_until_ready()) for _ in range(10))
    return 2 * 2048**3 / best


def flops_per_token(sequence: int) -> float:
    """Useful operations of forward and backward: 6 a weight that a token meets, plus attention."""
    c = load_model_config("cpu-81m")
    assert c.q_lora_rank is not None
    heads, qk, d = c.num_attention_heads, c.qk_head_dim, c.hidden_size
    attention = (
        d * c.q_lora_rank
        + c.q_lora_rank * heads * qk
        + d * (c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * d
    )
    experts = 3 * d * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    weights = c.num_hidden_layers * attention + c.num_moe_layers * (experts + d * c.n_routed_experts)
    weights += c.first_k_dense_replace * 3 * d * c.intermediate_size + d * c.vocab_size
    scores = c.num_hidden_layers * heads * (qk + c.v_head_dim) * sequence / 2
    return 6 * (weights + scores)


def main() -> None:
    """Time both, alternating, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)

    tokens = np.random.default_rng(0).integers(0, 8192, (args.batch, args.sequence), np.int32)
    runs = {"dsjax": dsjax_step(tokens)}
    for attention in ATTENTION:
        for experts in EXPERTS:
            name = f"transformers {attention}, {experts}"
            runs[name] = transformers_step(tokens, attention, experts)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compile and warm up
        run(), run()
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))

    speed = {name: tokens.size / statistics.median(t) for name, t in times.items()}
    peak, work = matmul_peak(), flops_per_token(args.sequence)
    table = Table("", "tokens/s", "GFLOP/s", "share of matmul peak", title="81M, one training step")
    for name, value in speed.items():
        share = f"{value * work / peak:.0%}"
        table.add_row(name, f"{value:,.0f}", f"{value * work / 1e9:.0f}", share)
    best = max(value for name, value in speed.items() if name != "dsjax")
    Console().print(table, f"dsjax / best transformers: {speed['dsjax'] / best:.2f}", sep="\n")
    print(json.dumps({"ratio": speed["dsjax"] / best, "peak_gflops": peak / 1e9, **speed}))


if __name__ == "__main__":
    main()
