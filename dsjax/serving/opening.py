"""From a checkpoint's path to an engine over it, and what the protocol needs to know of it."""

from __future__ import annotations

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
from rich.filesize import decimal

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.load import load_decoder
from dsjax.checkpoint.source import read_folder_config
from dsjax.data.language import check_vocabulary
from dsjax.errors import UserError
from dsjax.inference.engine import Engine
from dsjax.inference.settings import EngineSettings
from dsjax.model.decoder import Decoder, cache_shape
from dsjax.model.layers import count_parameters
from dsjax.serving.options import ModelOptions
from dsjax.serving.protocol import Served, load_served
from sharding.mesh import make_mesh
from sharding.rules import DECODE_RULES, Layout

DEFAULT_CONTEXT = 4096


def open_model(options: ModelOptions) -> tuple[Engine, Served]:
    """Load the weights and make room; what is quick to check is checked before.

    Raises:
        UserError: the checkpoint cannot be served, or not in this room; the message says why.
    """
    config = read_folder_config(options.checkpoint)
    longest = config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if options.context is None else options.context
    if context > longest:
        raise UserError(f"--context {context}: the model was made for at most {longest}")
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    groups = 1 if mesh is None else Layout(mesh, DECODE_RULES).ways("batch")
    rows = groups * math.ceil(options.rows / groups)  # every part of the batch has as many
    settings = EngineSettings(rows=rows, context=context, drafts=options.drafts)
    served = load_served(
        options.checkpoint, options.name, vocab_size=config.vocab_size, context=context
    )
    check_vocabulary(served.tokenizer, config.vocab_size, options.checkpoint)
    print(f"loading {options.checkpoint}", file=sys.stderr)
    model = load_decoder(options.checkpoint, options.dtype, mesh)
    size = token_bytes(model.config, jnp.dtype(model.dtype).itemsize, options.drafts)
    tokens = _cache_tokens(options.memory, size, settings, groups)
    settings = dataclasses.replace(settings, cache_tokens=tokens)
    print(_describe(model, settings, size), file=sys.stderr)
    return Engine(model, settings, vocab_size=served.tokenizer.vocab_size), served


def token_bytes(config: ModelConfig, itemsize: int, drafts: int) -> int:
    """What one token takes in the cache: a latent and a rotary key for every layer, MTP's too."""
    return (
        math.prod(cache_shape(config, mtp=config.num_nextn_predict_layers > 0 < drafts)) * itemsize
    )


def _cache_tokens(memory: int | None, size: int, settings: EngineSettings, groups: int) -> int:
    """Tokens that fit; a sequence of full length must, in every part of the batch."""
    if memory is None:
        return settings.rows * settings.context
    needed = groups * settings.context * size
    if memory < needed:
        among = f" in each of the batch's {groups} parts" if groups > 1 else ""
        raise UserError(
            f"--memory {decimal(memory)} is less than a sequence of {settings.context} tokens "
            f"takes{among}; give {decimal(needed)} or more, or a smaller --context"
        )
    return memory // size


def _describe(model: Decoder, settings: EngineSettings, size: int) -> str:
    """What there is now, in one line."""
    weights = jax.tree.leaves(model)
    count = count_parameters(model)
    if model.config.tie_word_embeddings:
        count -= model.head[...].size  # A copy of the embedding.
    held = sum(array.nbytes for array in weights)
    tokens = settings.cache_tokens or 0
    return (
        f"{count:,} parameters in {decimal(held)}, computed in {jnp.dtype(model.dtype)}; "
        f"cache of {tokens:,} tokens in {decimal(tokens * size)}"
    )
