"""DeepSeekMoE: shared experts, many small routed ones, and balance without an auxiliary loss.

DeepSeekMoE: arXiv:2401.06066. Bias balancing: arXiv:2408.15664. DeepSeek-V3 (arXiv:2412.19437)
section 2.1.2. V2 (arXiv:2405.04434) scores by softmax and has no bias. No token is ever dropped:
every (token, choice) pair is a row of a grouped matmul, so memory is that of T x K rows at any
imbalance.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsjax.architecture import DeepSeekConfig
from dsjax.kernels.experts import routed_experts
from dsjax.kernels.experts_inference import apply_experts
from dsjax.kernels.experts_parallel import routed_experts_over
from dsjax.kernels.swiglu import SwiGLU
from dsjax.model.layers import (
    MLP,
    RouterBias,
    parameter,
    put_columns_first,
    scale_of,
    use,
    variable_axes,
)
from sharding.by_hand import (
    first_place,
    gathered,
    of_all_owners,
    summed,
    summed_by_owner,
    travel_axis,
)
from sharding.rules import constrain

CHOSEN = "chosen experts"
"""The name of the choice, and of what is counted of it: a few numbers a token. Kept, the backward
pass sends tokens where the forward pass did, though it might round a score differently."""

LOGITS = "router logits"
"""The name of what scores are made of: kept, no router is computed twice, and tokens can be sent
before anything is."""


class Routing(NamedTuple):
    """Where tokens go: all float32 scores, the chosen experts, and their gates."""

    scores: Float[Array, "T E"]
    experts: Int[Array, "T K"]
    gates: Float[Array, "T K"]


class ExpertStats(NamedTuple):
    """What balancing needs to know of one layer's batch."""

    load: Float[Array, "*L E"]
    """Pairs sent to each expert; a count, held in float32 (exact up to 2^24 a microbatch). By hand,
    those of this device's tokens."""
    balance_loss: Float[Array, "*L"]
    """Sequence-wise balance loss, summed over the sequences, without its weight alpha. By hand,
    this device's share."""


def choose_experts(
    scores: Float[Array, "T E"],
    bias: Float[Array, "E"] | None,
    config: DeepSeekConfig,
    given: Int[Array, "T K"] | None = None,
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Choose each token's experts by group-limited top-k; return them and their gates.

    The bias steers the choice only; the gate keeps the unbiased score. A group's score is the sum
    of its two largest biased scores (V3), or its largest score (V2); experts outside the best
    `topk_group` groups cannot be chosen. DeepSeek-V3 section 2.1.2, equations 13 to 16:

        g'_i = s_i if s_i + b_i in TopK(s + b), else 0;    g_i = g'_i / sum_j g'_j

    Differs from the paper: gates are multiplied by `routed_scaling_factor`, which the equations
    leave out and the released weights need; and experts that are `given`, where they are not
    negative, are taken instead of the best.
    """
    steering = scores if bias is None else scores + bias[None]
    if config.n_group > 1:
        groups = steering.reshape(scores.shape[0], config.n_group, -1)
        if config.topk_method == "noaux_tc":
            group_scores = jax.lax.top_k(groups, 2)[0].sum(-1)
        else:
            group_scores = groups.max(-1)
        _, best = jax.lax.top_k(group_scores, config.topk_group)
        kept = (best[:, :, None] == jnp.arange(config.n_group)[None, None]).any(1)
        # -inf, never 0: biased scores can be negative, and the released code says -inf.
        steering = jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(scores.shape)
    _, experts = jax.lax.top_k(steering, config.num_experts_per_tok)
    if given is not None:
        experts = jnp.where(given >= 0, given, experts)
    experts = checkpoint_name(experts, CHOSEN)
    gates = jnp.take_along_axis(scores, experts, axis=1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return experts, gates * config.routed_scaling_factor


class Router(nnx.Module):
    """Affinity of every token to every expert, and the choice made from it."""

    def __init__(self, config: DeepSeekConfig, key: Array, dtype: jnp.dtype):
        shape = (config.n_routed_experts, config.hidden_size)
        axes = ("router", "embed")
        self.weight = parameter(key, shape, axes, config.initializer_range, dtype)
        if config.has_router_bias:
            self.bias = RouterBias(
                jnp.zeros(config.n_routed_experts, jnp.float32), axes=("router",)
            )
        self.config = config

    def __call__(self, x: Float[Array, "T D"], given: Int[Array, "T K"] | None = None) -> Routing:
        """Score and choose in float32 at full precision, whatever the dtype of x."""
        logits = jax.lax.dot_general(
            x.astype(jnp.float32),
            use(self.weight, jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits = checkpoint_name(logits, LOGITS)
        if self.config.scoring_func == "sigmoid":
            scores = jax.nn.sigmoid(logits)
        else:
            scores = jax.nn.softmax(logits, axis=-1)
        bias = use(self.bias, jnp.float32) if self.config.has_router_bias else None
        return Routing(scores, *choose_experts(scores, bias, self.config, given))


def devices_in_reach(groups: int, chosen: int, devices: int) -> int:
    """On how many devices that share the experts in order those of one token are at most."""
    return min(devices, chosen * -(-devices // groups))


class Experts(nnx.Module):
    """The routed experts' SwiGLU matrices, stacked: gate, up [E, F, D] and down [E, D, F]."""

    def __init__(self, config: DeepSeekConfig, key: Array, dtype: jnp.dtype):
        experts, width, embed = (
            config.n_routed_experts,
            config.moe_intermediate_size,
            config.hidden_size,
        )
        keys = jax.random.split(key, 3)
        std = config.initializer_range
        wide = "expert", "expert_mlp_rows", "expert_input"
        narrow = "expert", "expert_embed", "expert_mlp"
        self.gate = parameter(keys[0], (experts, width, embed), wide, std, dtype)
        self.up = parameter(keys[1], (experts, width, embed), wide, std, dtype)
        self.down = parameter(keys[2], (experts, embed, width), narrow, std, dtype)
        self.inputs_first = False
        self.groups = config.n_group, config.topk_group

    def __call__(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """sum_k gate_k * expert_k(x) for every token."""
        if self.inputs_first:
            return self._for_few(x, routing)
        held = self.gate, self.up, self.down
        scales = [scale_of(self, name) for name in SwiGLU._fields]
        # Wide: their gradients are float32 sums in a kernel, and stay so on their way to be summed.
        weights = SwiGLU(
            *(use(w, x.dtype, s, wide=True) for w, s in zip(held, scales, strict=True))
        )
        y: Array
        if (axis := travel_axis("expert")) is not None:
            reach = devices_in_reach(*self.groups, jax.lax.axis_size(axis))
            y = routed_experts_over(axis, reach, x, weights, routing.experts, routing.gates)
        else:
            y = routed_experts(x, weights, routing.experts, routing.gates)
        return summed(y, "expert_mlp")

    def _for_few(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """The same for decoding: by hand, each device sees all tokens, and has experts of its own.

        What is in FP8 stays so: `use` would widen all experts at every step, and not the chosen
        ones.
        """
        weights, blocks = [], []
        for name in SwiGLU._fields:
            weight, scale = getattr(self, name), scale_of(self, name)
            dtype = x.dtype if scale is None else weight.dtype
            weights.append(gathered(weight[...], variable_axes(weight), dtype))
            blocks += [] if scale is None else [scale[...]]
        first = first_place("expert", len(weights[0]))
        gates = jax.lax.bitcast_convert_type(routing.gates, jnp.int32)
        told = of_all_owners(jnp.concatenate([routing.experts, gates], axis=1), "expert")
        experts, gates = jnp.split(told, 2, axis=1)
        y = apply_experts(
            of_all_owners(x, "expert"),
            SwiGLU(*weights),
            experts - first,
            jax.lax.bitcast_convert_type(gates, jnp.float32),
            SwiGLU(*blocks) if blocks else None,
        )
        return summed_by_owner(y, "expert")

    def put_inputs_first(self) -> None:
        """Turn every matrix to [E, into, out], which few rows at a time are multiplied faster by.

        What is turned has no gradient.
        """
        for name in SwiGLU._fields:
            put_columns_first(self, name)
        self.inputs_first = True


class MoE(nnx.Module):
    """y = sum_k g_k expert_k(x) + shared(x)."""

    def __init__(self, config: DeepSeekConfig, key: Array, dtype: jnp.dtype):
        router, experts, shared = jax.random.split(key, 3)
        self.router = Router(config, router, dtype)
        self.experts = Experts(config, experts, dtype)
        if config.n_shared_experts:
            # Several shared experts are one MLP of their summed width.
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared = MLP(
                shared, config.hidden_size, width, std=config.initializer_range, dtype=dtype
            )
        self.config = config

    def __call__(
        self, x: Float[Array, "B S D"], given: Int[Array, "B S K"] | None = None
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """The layer's output, and the routing from which `expert_stats` counts.

        `given` is what `choose_experts` takes.
        """
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat, None if given is None else given.reshape(len(flat), -1))
        y = constrain(self.experts(flat, routing).reshape(x.shape), "batch", "sequence", "residual")
        return (y + self.shared(x) if self.config.n_shared_experts else y), routing


def expert_stats(routing: Routing, valid: Bool[Array, "B S"]) -> ExpertStats:
    """Loads and the sequence-wise balance loss, over valid (not padding) tokens only.

    DeepSeek-V3 section 2.1.2, equations 17 to 20, for one sequence of T tokens:

        f_i = E / (K T) * #{t : s_it among the K largest of s_t}
        P_i = 1/T sum_t s_it / sum_j s_jt
        loss = sum_i f_i P_i        (times alpha, by the caller)

    Differs from the paper: nothing. f counts the unbiased scores' top K, as equation 18 says, not
    the choice that the bias and the groups made.
    """
    experts, choices = routing.scores.shape[1], routing.experts.shape[1]
    weight = valid.reshape(-1).astype(jnp.float32)
    load = jnp.zeros(experts).at[routing.experts].add(weight[:, None])

    scores = routing.scores.reshape(*valid.shape, experts)
    counted = weight.reshape(*valid.shape, 1)
    # A sequence may lie on several devices. What is counted has no gradient; P_i is the mean of
    # all its tokens, and each device adds its own.
    tokens = jnp.maximum(summed(counted.sum(1), "sequence"), 1.0)
    _, top = jax.lax.top_k(jax.lax.stop_gradient(scores), choices)
    hits = (top[..., None] == jnp.arange(experts)[None, None, None]).any(2)
    f = summed((hits * counted).sum(1), "sequence") * experts / (choices * tokens)
    f = checkpoint_name(f, CHOSEN)
    p = (scores / scores.sum(-1, keepdims=True) * counted).sum(1) / tokens
    return ExpertStats(load, (f * p).sum())
