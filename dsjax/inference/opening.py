"""From a checkpoint that has been read to an engine over its weights."""

from __future__ import annotations

from collections.abc import Mapping

from dsjax.checkpoint.load import load_decoder
from dsjax.inference.engine import Engine
from dsjax.inference.reader import Reader
from dsjax.inference.settings import EngineSettings
from sharding.mesh import make_mesh


def open_engine(
    reader: Reader,
    rows: int,
    context: int,
    *,
    dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
    cache_tokens: int | None = None,
    vocab_size: int | None = None,
) -> Engine:
    """Load the weights and make room for sequences of `context` tokens.

    Args:
        rows: sequences that run at the same time; on a mesh, so many or a few more.
        dtype: float32 or bfloat16; None: as stored.
        mesh: sizes of mesh axes; None: one device.
        cache_tokens: tokens that the cache holds in all; None: `rows` sequences of full length.
        vocab_size: ids from here on are never produced; None: those that the tokenizer has not.

    Raises:
        UserError: the weights cannot be loaded, or not on this mesh.
    """
    made = None if mesh is None else make_mesh(dict(mesh))
    settings = EngineSettings(rows=rows, context=context, cache_tokens=cache_tokens)
    model = load_decoder(reader.checkpoint, dtype, made)
    return Engine(model, settings, vocab_size=vocab_size or reader.tokenizer.vocab_size)
