"""Continue prompts: the engine, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dsjax.errors import UserError
from dsjax.inference.engine import Engine
from dsjax.inference.request import LARGEST_SEED, Request, SamplingParams
from dsjax.inference.settings import EngineSettings
from dsjax.model.transformer import Transformer

ROWS = 16
"""Prompts that run at the same time; on a mesh, at most so many for each part of the batch."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt by at most `max_new_tokens` tokens.

    A continuation ends with the model's eos token, which is part of it, where one is produced. Each
    call makes an engine, which copies the weights: make an `Engine` for many calls.

    Args:
        model: on any mesh or device.
        prompts: token ids, none empty.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_p: only the likeliest tokens whose probabilities together reach this.
        seed: of the first prompt; the next has the next one.
        vocab_size: ids from here on are never produced; a tokenizer can know fewer.

    Raises:
        UserError: a prompt is empty, holds an unknown id, or leaves no room for the rest.
    """
    if not prompts:
        return []
    sampling = SamplingParams(max_new_tokens, temperature=temperature, top_p=top_p)
    limit = model.config.max_position_embeddings
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > limit:
        raise UserError(
            f"prompt and max_new_tokens={max_new_tokens} take {longest} tokens, beyond "
            f"max_position_embeddings={limit}; shorten either"
        )
    settings = EngineSettings(rows=min(len(prompts), ROWS), context=_context(longest, limit))
    engine = Engine(model, settings, vocab_size=vocab_size)
    made: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        own = dataclasses.replace(sampling, seed=(seed + number) % (LARGEST_SEED + 1))
        try:
            engine.submit(Request(str(number), tuple(map(int, prompt)), own))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    while not engine.idle:
        for update in engine.step():
            made[int(update.request_id)] += update.tokens
    return made


def _context(longest: int, limit: int) -> int:
    """A power of two, so that calls of similar size share compiled programs."""
    return min(limit, max(256, 1 << (longest - 1).bit_length()))
