"""Llama, Qwen2 and Qwen3: the dense families, whose meaning is written down here in numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.configs import DENSE_CONFIGS
from reference.weights import place, random_weights

from dsjax.architecture import DenseConfig, Llama3Config, YarnConfig
from dsjax.model.decoder import make_pages, take_apart
from dsjax.model.layers import tree_shardings
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import Layout, use_layout

from .conftest import LENGTH, ROWS, off, random_tokens
from .test_decoding import COUNT, PAGE, extend

EXACT = 1e-5

logits = jax.jit(lambda model, tokens, segments=None: model(tokens, None, segments).logits)


class Dense:
    """The released weights, by name, and the equations in float64."""

    def __init__(self, config: DenseConfig):
        self.config = config
        self.weights = random_weights(config)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [S, V] of one sequence."""
        c, w = self.config, self.weights
        x = w["model.embed_tokens.weight"][tokens].astype(np.float64)
        for layer in range(c.num_hidden_layers):
            name = f"model.layers.{layer}."
            x = x + self.attention(name, self.norm(name + "input_layernorm", x))
            y = self.norm(name + "post_attention_layernorm", x)
            gate, up = (y @ w[f"{name}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[name + "mlp.down_proj.weight"].T
        head = "model.embed_tokens" if c.tie_word_embeddings else "lm_head"
        return self.norm("model.norm", x) @ w[head + ".weight"].T

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + self.config.rms_norm_eps) * self.weights[name + ".weight"]

    def attention(self, layer: str, x: np.ndarray) -> np.ndarray:
        c, w = self.config, self.weights
        heads = []
        for name in ("q", "k", "v"):
            y = x @ w[f"{layer}self_attn.{name}_proj.weight"].T
            if c.model_type == "qwen2":
                y = y + w[f"{layer}self_attn.{name}_proj.bias"]
            y = y.reshape(len(x), -1, c.head_dim)
            if c.model_type == "qwen3" and name != "v":
                y = self.norm(f"{layer}self_attn.{name}_norm", y)
            heads.append(self.rotated(y) * self.amplitude() if name != "v" else y)
        q, k, v = heads
        out = np.zeros_like(q)
        for head in range(c.num_attention_heads):
            shared = head // (c.num_attention_heads // c.num_key_value_heads)
            scores = q[:, head] @ k[:, shared].T * self.config.head_dim**-0.5
            scores[np.triu_indices(len(x), 1)] = -np.inf
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = chances / chances.sum(-1, keepdims=True) @ v[:, shared]
        return out.reshape(len(x), -1) @ w[layer + "self_attn.o_proj.weight"].T

    def amplitude(self) -> float:
        """Of cos and sin. YaRN leaves the softmax alone: only DeepSeek's attention sharpens it."""
        yarn = self.config.rope_scaling
        if not isinstance(yarn, YarnConfig):
            return 1.0
        wide, all_dim = (
            0.1 * m * np.log(yarn.factor) + 1 for m in (yarn.mscale, yarn.mscale_all_dim)
        )
        return wide / all_dim

    def rotated(self, x: np.ndarray) -> np.ndarray:
        """As complex numbers whose real parts are a head's first half."""
        half = self.config.head_dim // 2
        turns = np.arange(len(x))[:, None, None] * np.array([self.speed(i) for i in range(half)])
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turns)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def speed(self, pair: int) -> float:
        """Radians a position; the two extensions as their own code tells them."""
        c, scaling = self.config, self.config.rope_scaling
        speed = c.rope_theta ** (-2 * pair / c.head_dim)
        if isinstance(scaling, Llama3Config):
            length, wavelength = scaling.original_max_position_embeddings, 2 * np.pi / speed
            if wavelength > length / scaling.low_freq_factor:
                return speed / scaling.factor
            if wavelength < length / scaling.high_freq_factor:
                return speed
            smooth = (length / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            return (1 - smooth) * speed / scaling.factor + smooth * speed
        if isinstance(scaling, YarnConfig):

            def place(turns: float) -> float:
                ratio = scaling.original_max_position_embeddings / (turns * 2 * np.pi)
                return c.head_dim * np.log(ratio) / (2 * np.log(c.rope_theta))

            low = max(np.floor(place(scaling.beta_fast)), 0)
            high = min(np.ceil(place(scaling.beta_slow)), c.head_dim - 1)
            ramp = np.clip((pair - low) / max(high - low, 0.001), 0, 1)
            return speed / scaling.factor * ramp + speed * (1 - ramp)
        return speed if scaling is None else speed / scaling.factor


@pytest.fixture(scope="module", params=DENSE_CONFIGS)
def reference(request: pytest.FixtureRequest) -> Dense:
    return Dense(DENSE_CONFIGS[request.param])


@pytest.fixture(scope="module")
def dense(reference: Dense) -> Transformer:
    return place(reference.config, reference.weights)


@pytest.fixture(scope="module")
def text(reference: Dense) -> np.ndarray:
    return random_tokens(reference.config, (ROWS, LENGTH))


@pytest.fixture(scope="module")
def expected(reference: Dense, text: np.ndarray) -> np.ndarray:
    return np.stack([reference(row) for row in text])


def test_a_dense_family_is_what_its_equations_say(
    dense: Transformer, text: np.ndarray, expected: np.ndarray
) -> None:
    assert off(logits(dense, text), expected) < EXACT


def test_documents_packed_into_a_row_are_computed_as_if_alone(
    dense: Transformer, text: np.ndarray, reference: Dense
) -> None:
    segments = np.repeat([[1, 2, 3]], [20, 15, LENGTH - 35], axis=1)
    found = np.asarray(logits(dense, text[:1], jnp.asarray(segments)))[0]
    for begin, end in ((0, 20), (20, 35), (35, LENGTH)):
        assert off(found[begin:end], reference(text[0, begin:end])) < EXACT


@pytest.mark.parametrize("at_once", [1, 12])
def test_a_cache_of_the_shared_heads_says_the_same(
    dense: Transformer, text: np.ndarray, expected: np.ndarray, at_once: int
) -> None:
    decoder = take_apart(dense)
    pages = make_pages(dense.config, 1, COUNT, PAGE, jnp.float32, mtp=False)
    assert pages[0].shape[-1] == 2 * 2 * dense.config.head_dim
    pages = jax.tree.map(lambda page: page + 9.0, pages)  # what is not written must not matter
    for begin in range(0, 24, at_once):
        part = text[:2, begin : begin + at_once]
        hidden, pages = extend(decoder, pages, part, jnp.full(2, begin))
        found = jnp.stack([decoder.logits(hidden[:, i]) for i in range(at_once)], axis=1)
        assert off(found, expected[:2, begin : begin + at_once]) < EXACT


def test_eight_devices_say_the_same(
    dense: Transformer, text: np.ndarray, expected: np.ndarray
) -> None:
    layout = Layout(make_mesh({"fsdp": 2, "tensor": 4}))
    placed: Any = jax.device_put(dense, tree_shardings(dense, layout))
    with use_layout(layout):
        found = jax.jit(lambda model, tokens: model(tokens).logits)(placed, text)
    assert off(found, expected) < EXACT
