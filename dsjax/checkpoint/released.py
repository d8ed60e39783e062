"""What released folders store that follows from the rest, and what they leave out because it does.

Each is accepted with a line that says what was done. transformers and vLLM pass over the same:

    *.rotary_emb.inv_freq         follows from config.json; older libraries saved it in every layer.
                                  Kimi-K2's is not even of the width that is rotated
    lm_head.weight of a tied      the embedding is used, as `tie_word_embeddings` says
      model
    embed_tokens.weight of a      some writers keep one name of what is shared, and that the head's
      tied model, absent
    embed_tokens, shared_head.    copies of the main model's embedding and head
      head of an MTP layer, absent

Imports no jax.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import Tensor
from dsjax.checkpoint.safetensors import same_numbers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DERIVED = re.compile(r"\.rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)$")


def as_expected(
    config: ModelConfig, expected: list[Tensor], stored: Mapping[str, Any], *, compare: bool
) -> tuple[dict[str, Any], list[str]]:
    """Leave out what follows from the rest, and put in what is shared.

    Args:
        config: of the layers that are there.
        expected: its tensors.
        stored: those of the files.
        compare: read a tied model's head, to say whether it is the embedding.

    Returns:
        The tensors, and a line for each thing that was done.
    """
    found = {name: entry for name, entry in stored.items() if not _DERIVED.search(name)}
    remarks = []
    if dropped := len(stored) - len(found):
        remarks.append(f"{dropped:,} rotary frequencies are passed over: config.json gives them")
    if config.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        remarks.append(_tied(head, found.setdefault(EMBEDDING, head), compare=compare))
    absent = [t for t in expected if t.repeats and t.name not in found and t.repeats in found]
    if absent:
        found |= {tensor.name: found[str(tensor.repeats)] for tensor in absent}
        names = ", ".join(tensor.name for tensor in absent[:2]) + ", ..." * (len(absent) > 2)
        remarks.append(f"{names} not stored: the MTP layer shares the main model's")
    return found, remarks


def _tied(head: Any, embedding: Any, *, compare: bool) -> str:
    if head is embedding:
        return f"{EMBEDDING} is not stored: {HEAD}, to which it is tied, is taken for it"
    said = f"{HEAD} is passed over: tie_word_embeddings is true"
    if not compare:
        return said
    if head == embedding or same_numbers(head, embedding):
        return f"{said}, and it is the embedding's copy"
    return f"{said}. It DIFFERS from the embedding, so config.json may be wrong"
