"""Tokens per second of one training step on a CPU: dsjax beside transformers.

    python benchmarks/train_step.py            needs the `parity` extra; some five minutes

Both train the same 81M-parameter DeepSeek-V3 (no MTP, float32, two threads) on the same tokens with
AdamW and clipping. transformers runs each of its attention and expert backends, and the best one
counts. Each library lives in a process of its own, which sleeps while the other is timed; both
processes run on the same two cores. The two take turns; medians are compared. Prints one table and
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
from contest import (
    ATTENTION,
    EXPERTS,
    PEAK_SIZE,
    Contestants,
    Worker,
    large_product,
    measure,
    model_config,
    transformers_model,
)


def dsjax_contestants(tokens: np.ndarray) -> Contestants:
    """dsjax's one way to run, and the matmul peak that all are held against."""
    return {"dsjax": dsjax_step(tokens), "peak": large_product()}


def transformers_contestants(tokens: np.ndarray) -> Contestants:
    """Every pair of transformers' attention and expert backends."""
    return {
        f"transformers {attention}, {experts}": transformers_step(tokens, attention, experts)
        for attention in ATTENTION
        for experts in EXPERTS
    }


def dsjax_step(tokens: np.ndarray) -> Callable[[], float]:
    """One jitted, donated training step on `tokens` [batch, seq]; returns its loss."""
    import jax
    import jax.numpy as jnp

    from dsjax.config_files import load_pretrain_config
    from dsjax.training.step import Batch, Knobs, init_state, make_train_step

    config = load_pretrain_config(
        "cpu-tiny",
        [f"data.sequence_length={tokens.shape[1]}", "training.loss_chunk=128"],
    ).model_copy(update={"model": model_config()})
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
    import torch

    model = transformers_model(attention, experts).train()
    model.config.use_cache = False
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


def flops_per_token(sequence: int) -> float:
    """Useful operations of forward and backward: 6 a weight that a token meets, plus attention."""
    c = model_config()
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
    experts += d * c.n_routed_experts  # the router
    weights = c.num_hidden_layers * attention + c.num_moe_layers * experts
    weights += c.first_k_dense_replace * 3 * d * c.intermediate_size + d * c.vocab_size
    scores = c.num_hidden_layers * heads * (qk + c.v_head_dim) * sequence / 2
    return 6 * (weights + scores)


def main() -> None:
    """Time both, alternating, and print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Tokens per second of one training step.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    tokens = np.random.default_rng(0).integers(0, 8192, (args.batch, args.sequence), np.int32)
    contestants = (dsjax_contestants, transformers_contestants)
    times = measure([Worker(partial(make, tokens)) for make in contestants], args.rounds)

    peak = 2 * PEAK_SIZE**3 / min(t.wall for t in times.pop("peak"))
    work = flops_per_token(args.sequence)
    speed = {n: tokens.size / statistics.median(t.wall for t in ts) for n, ts in times.items()}
    processor = {n: statistics.median(t.processor for t in ts) for n, ts in times.items()}
    table = Table(title="81M, one training step")
    for heading in ("", "tokens/s", "GFLOP/s", "share of matmul peak", "processor s"):
        table.add_column(heading)
    for name, value in speed.items():
        flops = value * work
        share, used = f"{flops / peak:.0%}", f"{processor[name]:.2f}"
        table.add_row(name, f"{value:,.0f}", f"{flops / 1e9:.0f}", share, used)
    ratio = speed["dsjax"] / max(value for name, value in speed.items() if name != "dsjax")
    Console().print(table, f"dsjax / best transformers: {ratio:.2f}", sep="\n")
    print(
        json.dumps(
            {"ratio": ratio, "peak_gflops": peak / 1e9, "tokens_s": speed, "processor_s": processor}
        )
    )


if __name__ == "__main__":
    main()
