"""Every known way to get DeepSeek slightly wrong is noticed.

Each trap is the mistake itself, made in the code (an edit of one function's source) or in how the
files are read (another order of the same numbers). Unharmed, the model equals the numpy reference;
with any of the mistakes it must be visibly off. An edit that no longer finds its place fails: the
code has moved on, and the trap has to follow.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_model
from reference.configs import CONFIGS, MOONLIGHT
from reference.weights import place, random_weights

from dsjax.architecture import DeepSeekConfig
from dsjax.kernels.experts import routed_experts_reference
from dsjax.kernels.mla_attention import mla_attention_reference
from dsjax.model import block, mla, moe, mtp, rope, transformer

from .conftest import LENGTH, off, random_tokens

EXACT, VISIBLE = 3e-6, 3e-4

Weights = dict[str, np.ndarray]


class Edit(NamedTuple):
    """One mistake in one function."""

    owner: Any
    name: str
    right: str
    wrong: str


class Setting(NamedTuple):
    """One mistake in a constant."""

    owner: Any
    name: str
    wrong: Any


class Misread(NamedTuple):
    """One mistake in the order of a file's numbers: names that end so are rearranged."""

    suffix: str
    rearrange: Callable[[np.ndarray, DeepSeekConfig], np.ndarray]


def edited(change: Edit) -> Any:
    """The function with its source changed in one spot."""
    original = inspect.unwrap(getattr(change.owner, change.name))
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(change.right) == 1, f"{change.name} has no single {change.right!r} any more"
    source = source.replace(change.right, change.wrong)
    flags = __future__.annotations.compiler_flag
    scope = dict(original.__globals__)
    exec(compile(source, change.name, "exec", flags, dont_inherit=True), scope)
    return scope[change.name]


def replace_everywhere(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, new: Any) -> None:
    """Replace a function or method, also where other modules have imported it by name."""
    old = getattr(owner, name)
    for holder in (owner, mla, moe, mtp, rope, transformer):
        if getattr(holder, name, None) is old:
            monkeypatch.setattr(holder, name, new)


def values_first(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    k, v = np.split(_heads(w, c), [c.qk_nope_head_dim], axis=1)
    return np.concatenate([v, k], axis=1).reshape(w.shape)


def all_keys_before_all_values(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    k, v = np.split(w, [c.num_attention_heads * c.qk_nope_head_dim])
    return np.concatenate([_heads(k, c), _heads(v, c)], axis=1).reshape(w.shape)


def rope_first(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    q_rope, q_nope = np.split(_heads(w, c), [c.qk_rope_head_dim], axis=1)
    return np.concatenate([q_nope, q_rope], axis=1).reshape(w.shape)


def rope_before_latent(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    return np.roll(w, -c.qk_rope_head_dim, axis=0)


def hidden_before_embedding(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    return np.roll(w, c.hidden_size, axis=1)


def _heads(w: np.ndarray, c: DeepSeekConfig) -> np.ndarray:
    return w.reshape(c.num_attention_heads, -1, w.shape[1])


def routing(right: str, wrong: str) -> Edit:
    return Edit(moe, "choose_experts", right, wrong)


TRAPS: dict[str, tuple[str, Edit | Setting | Misread]] = {
    # Routing. Each name is followed by the configuration that shows the mistake.
    "the gate takes the biased score": (
        "v3",
        routing("take_along_axis(scores,", "take_along_axis(steering,"),
    ),
    "the bias is left out of the choice": (
        "v3",
        routing("scores + bias[None]", "scores"),
    ),
    "the router multiplies in bfloat16": (
        "v3",
        Edit(
            moe.Router,
            "__call__",
            "x.astype(jnp.float32)",
            "x.astype(jnp.bfloat16).astype(jnp.float32)",
        ),
    ),
    "groups are scored without the bias": (
        "v3",
        routing("jax.lax.top_k(groups, 2)", "jax.lax.top_k(scores.reshape(groups.shape), 2)"),
    ),
    "groups are scored by their best expert": ("v3", routing('== "noaux_tc"', '== "never"')),
    "rejected groups are masked with 0": ("v3", routing("-jnp.inf", "0.0")),
    "groups are ignored": ("v3", routing("config.n_group > 1", "config.n_group > 99")),
    "gates are not normalized": ("v3", routing("if config.norm_topk_prob", "if False")),
    "gates are normalized over all experts": ("v3", routing("gates.sum", "scores.sum")),
    "the routed factor is left out": ("v3", routing(" * config.routed_scaling_factor", "")),
    "V2's gates are normalized": ("v2", routing("if config.norm_topk_prob", "if True")),
    "V2's groups are scored by a sum of two": ("v2", routing('== "noaux_tc"', '!= "never"')),
    "V2 scores by sigmoid": (
        "v2",
        Edit(moe.Router, "__call__", "jax.nn.softmax(logits, axis=-1)", "jax.nn.sigmoid(logits)"),
    ),
    "the balance loss counts the biased choice": (
        "v3",
        Edit(
            moe,
            "expert_stats",
            "jax.lax.top_k(jax.lax.stop_gradient(scores), choices)",
            "None, routing.experts.reshape(*valid.shape, choices)",
        ),
    ),
    "the balance loss takes raw scores": (
        "v3",
        Edit(moe, "expert_stats", "scores / scores.sum(-1, keepdims=True)", "scores"),
    ),
    # Rotary embedding and the scale of scores.
    "m squared is missing": ("v3", Edit(rope, "softmax_scale", "** 2", "** 0")),
    "m is not squared": ("v3", Edit(rope, "softmax_scale", "** 2", "** 1")),
    "m takes the wrong mscale": (
        "two_depths_and_unequal_mscales",
        Edit(rope, "softmax_scale", "yarn.mscale_all_dim", "yarn.mscale"),
    ),
    "V2's m squared is missing": ("v2", Edit(rope, "softmax_scale", "** 2", "** 0")),
    "the amplitude is always 1": (
        "two_depths_and_unequal_mscales",
        Edit(rope, "rotary_amplitude", "not isinstance(yarn, YarnConfig)", "True"),
    ),
    "the amplitude is not a ratio": (
        "v3",
        Edit(rope, "rotary_amplitude", "yarn.mscale_all_dim", "0.0"),
    ),
    "rotary pairs are halves, not neighbours": (
        "v3",
        Edit(
            rope,
            "rotate_pairs",
            "x[..., 0::2], x[..., 1::2]",
            "*jnp.split(x, 2, axis=-1)",
        ),
    ),
    "a query's rotary pairs are halves, not neighbours": (
        "v3",
        Edit(
            mla.MLA,
            "_flat_queries",
            "weight[:, nope::2], weight[:, nope + 1 :: 2]",
            "weight[:, nope:]",
        ),
    ),
    "a query's pairs turn the other way": (
        "v3",
        Edit(mla.MLA, "_flat_queries", "(q_rope, *table)", "(q_rope, table[0], -table[1])"),
    ),
    "pairs turn the other way": (
        "v3",
        Edit(
            rope,
            "_turn",
            "x * cos - y * sin, y * cos + x * sin",
            "y * cos - x * sin, x * cos + y * sin",
        ),
    ),
    "YaRN slows every pair": ("v3", Edit(rope, "_yarn_ramp", "0, 1)", "1, 1)")),
    "YaRN's ramp runs backwards": (
        "v3",
        Edit(rope, "_yarn_ramp", "(pairs - low) / width", "1 - (pairs - low) / width"),
    ),
    "YaRN's ramp is not rounded outwards": ("v3", Edit(rope, "_yarn_ramp", "math.ceil", "float")),
    "YaRN's ramp has one end": (
        "v3",
        Edit(rope, "_yarn_ramp", "pair_with(yarn.beta_slow)", "pair_with(yarn.beta_fast)"),
    ),
    "YaRN is left out": ("v3", Edit(rope, "rotary_frequencies", "scaling is None", "True")),
    # The order of numbers in the files.
    "values come before keys": ("v3", Misread("kv_b_proj.weight", values_first)),
    "all keys come before all values": (
        "v3",
        Misread("kv_b_proj.weight", all_keys_before_all_values),
    ),
    "the query's rotary half comes first": ("v3", Misread("q_b_proj.weight", rope_first)),
    "the same without q_lora": ("moonlight", Misread("q_proj.weight", rope_first)),
    "the rotary key comes before the latent": (
        "v3",
        Misread("kv_a_proj_with_mqa.weight", rope_before_latent),
    ),
    "MTP takes the hidden state first": ("v3", Misread("eh_proj.weight", hidden_before_embedding)),
    # Norms.
    "latent norms follow rms_norm_eps": ("small_numbers", Setting(mla, "LATENT_NORM_EPS", 1e-5)),
    "no norm follows rms_norm_eps": (
        "small_numbers",
        Edit(block.Block, "__init__", "config.rms_norm_eps", "1e-6"),
    ),
    # MTP.
    "MTP is fed before the final norm": (
        "v3",
        Edit(
            transformer.Transformer,
            "look_ahead",
            "hidden, normed, stats = out.hidden",
            "hidden, normed, stats = out.hidden / self.norm.weight[None, None]",
        ),
    ),
    "MTP sees its own token": (
        "v3",
        Edit(
            mtp,
            "shift",
            "x[:, by:], jnp.repeat(x[:, -1:], by, axis=1)",
            "x[:, by - 1 :], jnp.repeat(x[:, -1:], by - 1, axis=1)",
        ),
    ),
    "every MTP depth sees the next token": (
        "two_depths_and_unequal_mscales",
        Edit(
            transformer.Transformer, "look_ahead", "shift(out.tokens, by)", "shift(out.tokens, 1)"
        ),
    ),
    "every MTP depth starts from the main model": (
        "two_depths_and_unequal_mscales",
        Edit(
            transformer.Transformer, "look_ahead", "run(module, hidden)", "run(module, out.hidden)"
        ),
    ),
}

SHOWN_BY = CONFIGS | {
    # Numbers so small that the epsilons of norms matter.
    "small_numbers": DeepSeekConfig(**MOONLIGHT),
}


def departure(name: str, misread: Misread | None = None) -> float:
    """How far the model, run operation by operation, is from the reference anywhere."""
    config = SHOWN_BY[name]
    weights = random_weights(config)
    if name == "small_numbers":
        for small in ("kv_a_proj_with_mqa.weight", "embed_tokens.weight"):
            weights |= {n: w * np.float32(1e-2) for n, w in weights.items() if n.endswith(small)}
    held = dict(weights)
    if misread:
        hit = {
            n: misread.rearrange(w, config) for n, w in held.items() if n.endswith(misread.suffix)
        }
        assert hit
        held |= hit
    tokens = random_tokens(config, (1, LENGTH))
    with jax.disable_jit():
        out = place(config, held)(jnp.asarray(tokens))
        found = [out.logits[0], *(x[0, :-k] for k, x in enumerate(out.mtp_logits, start=1))]
        found += [out.balance_loss]
    plain = config.model_dump()
    row = numpy_model.run(plain, weights, tokens[0], np.arange(LENGTH))
    balance = [numpy_model.balance_loss(plain, sent.scores) for sent in row.routed]
    expected = [row.logits, *row.mtp_logits, balance]
    return max(off(*pair) for pair in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def simple_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' meanings, which run operation by operation: nothing is compiled for a trap."""
    monkeypatch.setattr(mla, "mla_attention", mla_attention_reference)
    monkeypatch.setattr(moe, "routed_experts", routed_experts_reference)


@pytest.mark.parametrize("name", sorted({name for name, _ in TRAPS.values()}))
def test_the_model_unharmed_equals_the_reference(name: str) -> None:
    assert departure(name) < EXACT


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_noticed(trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, mistake = TRAPS[trap]
    misread = None
    match mistake:
        case Edit():
            new = edited(mistake)
            replace_everywhere(monkeypatch, mistake.owner, mistake.name, new)
        case Setting():
            monkeypatch.setattr(mistake.owner, mistake.name, mistake.wrong)
        case Misread():
            misread = mistake
    assert departure(name, misread) > VISIBLE


def test_gates_of_vanished_scores_are_finite_only_by_the_1e_20() -> None:
    """Sigmoids of very negative logits are exactly 0 in float32."""
    change = routing(" + 1e-20", "")
    scores, config = jnp.zeros((1, 8)), CONFIGS["v3"]
    assert jnp.isfinite(moe.choose_experts(scores, None, config)[1]).all()
    assert jnp.isnan(edited(change)(scores, None, config)[1]).all()
