"""The tokenizer inside a GGUF file, as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from dsjax.errors import UserError, one_line

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that are no pieces of text: special ones, and those that only stand whole."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> PreTokenizer:
    cut = Split(Regex(pattern), "isolated")
    return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizers() -> dict[str, PreTokenizer]:
    """How text is cut before the merges, by the name that `tokenizer.ggml.pre` gives it."""
    three_digits, one_digit = _split(_WORDS % r"\p{N}{1,3}"), _split(_WORDS % r"\p{N}")
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "default": gpt2,
        "gpt-2": gpt2,
        "smollm": Sequence([Digits(individual_digits=True), gpt2]),
        "llama-bpe": three_digits,
        "qwen2": one_digit,
        "deepseek-r1-qwen": one_digit,
    }


def _byte_level(
    tokens: list[str], fields: dict[str, Any], cut: PreTokenizer, file: Path
) -> Tokenizer:
    """The tokenizer of these tokens; what they are and how they merge must be told for each."""
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = fields.get("tokenizer.ggml.merges", [])
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not isinstance(merges, list):
        raise UserError(f"{file}: the tokenizer's lists do not fit together; take another file")
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"{file}: its tokenizer cannot be read: {one_line(error)}") from None
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    return tokenizer


def tokenizer_files(fields: dict[str, Any], file: Path) -> dict[str, bytes]:
    """The two files by their names; the chat template is in the second.

    Raises:
        UserError: the tokenizer is of a kind that is not known here.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    known = _pre_tokenizers()
    if (
        not isinstance(tokens, list)
        or not tokens
        or model != "gpt2"
        or not isinstance(pre, str)
        or pre not in known
    ):
        raise UserError(
            f"{file}: a tokenizer of model {model!r} that cuts text like {pre!r}; byte-level BPE "
            f"(gpt2) is read, cutting like {', '.join(known)}"
        )
    tokenizer = _byte_level(tokens, fields, known[pre], file)
    config: dict[str, Any] = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for role, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (number := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise UserError(f"{file}: {field}_token_id={number!r}, of {len(tokens)} tokens")
            config[f"{role}_token"] = tokens[number]
    if (template := fields.get("tokenizer.chat_template")) is not None:
        if not isinstance(template, str):
            raise UserError(f"{file}: its chat template is {template!r}, expected a text")
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": text.encode(),
    }
