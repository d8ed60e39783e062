"""Continue prompts, greedily or by sampling: one jitted prefill, one jitted decode loop.

Prompts of a call run as one batch over a preallocated latent cache. Prompt length and number of
new tokens are rounded up to powers of two, so that calls of similar size share a compiled program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.errors import UserError
from dsjax.model.transformer import Cache, DeepSeek


def generate(
    model: DeepSeek,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens` tokens.

    A continuation ends with the model's eos token, which is part of it, where one is produced.

    Args:
        model: on any mesh or device.
        prompts: token ids, none empty.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        seed: of the sampling.
        vocab_size: ids from here on are never produced; a tokenizer can know fewer than the model.

    Raises:
        UserError: a prompt is empty, holds an id outside the vocabulary, or leaves no room for
            `max_new_tokens` within the model's context.
    """
    _check(model, prompts, max_new_tokens, temperature)
    if not prompts:
        return []
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _power_of_two(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    steps = _power_of_two(max_new_tokens)
    known = model.config.vocab_size if vocab_size is None else vocab_size
    first, cache = _prefill(model, tokens, lengths, tokens.shape[1] + steps)
    made = _decode(
        model,
        first,
        cache,
        jnp.float32(temperature),
        jax.random.key(seed),
        jnp.int32(known),
        jnp.int32(max_new_tokens),
        steps,
    )
    eos = model.config.eos_token_id
    return [_until(row[:max_new_tokens].tolist(), eos) for row in np.asarray(made)]


@partial(jax.jit, static_argnums=3)
def _prefill(
    model: DeepSeek, tokens: Int[Array, "B S"], lengths: Int[Array, "B"], slots: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after each prompt's last token, and the filled cache."""
    hidden, cache = model.prefill(tokens, lengths, slots)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    return model.logits(last)[:, 0], cache


@partial(jax.jit, static_argnums=7)
def _decode(
    model: DeepSeek,
    logits: Float[Array, "B V"],
    cache: Cache,
    temperature: Float[Array, ""],
    key: Array,
    vocab_size: Int[Array, ""],
    limit: Int[Array, ""],
    slots: int,
) -> Int[Array, "B N"]:
    """Sample and extend until every row has met eos or `limit` tokens are made."""
    rows = logits.shape[0]
    eos = -1 if model.config.eos_token_id is None else model.config.eos_token_id

    def unfinished(carry: tuple) -> Array:
        made, done = carry[0], carry[4]
        return (made < limit) & ~done.all()

    def one_token(carry: tuple) -> tuple:
        made, logits, cache, tokens, done = carry
        chosen = _choose(logits, temperature, jax.random.fold_in(key, made), vocab_size)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], made, 1)
        hidden, cache = model.decode(chosen[:, None], cache)
        return made + 1, model.logits(hidden)[:, 0], cache, tokens, done | (chosen == eos)

    tokens = jnp.zeros((rows, slots), jnp.int32)
    start = (jnp.int32(0), logits, cache, tokens, jnp.zeros(rows, bool))
    return jax.lax.while_loop(unfinished, one_token, start)[3]


def _choose(logits: Array, temperature: Array, key: Array, vocab_size: Array) -> Array:
    """One token a row, [B]."""
    known = jnp.arange(logits.shape[1])[None] < vocab_size
    logits = jnp.where(known, logits, -jnp.inf)
    sampled = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6), axis=-1)
    greedy = jnp.argmax(logits, axis=-1)
    return jnp.where(temperature > 0, sampled, greedy).astype(jnp.int32)


def _check(
    model: DeepSeek, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float
) -> None:
    config = model.config
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}: expected 0 (greedy) or more")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty; begin it with the bos token")
        outside = [token for token in prompt if not 0 <= token < config.vocab_size]
        if outside:
            raise UserError(
                f"prompt {number} holds token {outside[0]}, outside vocab_size="
                f"{config.vocab_size}; encode it with the model's own tokenizer"
            )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, which with max_new_tokens="
                f"{max_new_tokens} go beyond max_position_embeddings="
                f"{config.max_position_embeddings}; shorten either"
            )


def _power_of_two(count: int) -> int:
    return max(8, 1 << (count - 1).bit_length())


def _until(tokens: list[int], eos: int | None) -> list[int]:
    """Up to and with the first eos."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
