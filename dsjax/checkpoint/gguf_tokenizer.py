"""The tokenizer inside a GGUF file, as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from dsjax.errors import UserError, one_line

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that are no pieces of text: special ones, and those that only stand whole."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(letters: str, digits: str, marks: str = "") -> str:
    """The pattern of GPT-4's successors: words with one character before them, digits, the rest."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = [_words(r"\p{L}", r"\p{N}{1,3}")]
_QWEN2 = [_words(r"\p{L}", r"\p{N}")]
# GPT-2's words with each digit apart: in one pattern, which a million digits take half the time.
_SMOLLM = [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"]

# Upper, lower and title case, but for letters that the released pattern does not list.
_CASED = (
    r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c8f\u2d00-\u2d2d\ua790-\ua7fa"
    r"\uab30-\uab68\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}\x{1d400}-\x{1dfff}]]"
)
_CJK = r"[\u0800-\u9fa5\uac00-\ud7ff]+"

_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

SPLITS: dict[str, list[str]] = {
    # Punctuation, GPT-2's words, and what stands in digits; three of them at once.
    "default": [r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "gpt-2": [_GPT2],
    "olmo": [_GPT2],
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "command-r": _SMOLLM,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _QWEN2,
    "qwen35": [_words(r"[\p{L}\p{M}]", r"\p{N}", marks=r"\p{M}")],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"(?<!\s)\s+$",  # the released \s+$ tries every beginning of a run
        _CJK,
        r"\p{N}",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u30ff]+",
        r"[!-/:-~&&[^A-Za-z]][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
"""How text is split before the merges, one pattern after the other, by `tokenizer.ggml.pre`.

As llama.cpp splits it, with the families' own patterns where it has other ones of the same matches.
"""

WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"}
"""Here a word that is a token is that token, however it would be merged; and bos is added."""


def pre_tokenizer(pre: str) -> PreTokenizer:
    """What splits text for a `tokenizer.ggml.pre`, and spells its bytes."""
    splits: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level(tokens: list[str], fields: dict[str, Any], pre: str, file: Path) -> Tokenizer:
    """The tokenizer of these tokens; what they are and how they merge must be told for each."""
    kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = fields.get("tokenizer.ggml.merges", [])
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not isinstance(merges, list):
        raise UserError(f"{file}: the tokenizer's lists do not fit together; take another file")
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in WHOLE_WORDS)
        tokenizer = Tokenizer(model)
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"{file}: its tokenizer cannot be read: {one_line(error)}") from None
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
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
    if (
        not isinstance(tokens, list)
        or not tokens
        or model != "gpt2"
        or not isinstance(pre, str)
        or pre not in SPLITS
    ):
        raise UserError(
            f"{file}: a tokenizer of model {model!r} that cuts text like {pre!r}; byte-level BPE "
            f"(gpt2) is read, cutting like {', '.join(SPLITS)}"
        )
    tokenizer = _byte_level(tokens, fields, pre, file)
    add_bos = bool(fields.get("tokenizer.ggml.add_bos_token", pre in WHOLE_WORDS))
    config: dict[str, Any] = {
        "add_bos_token": add_bos,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for role, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (number := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise UserError(f"{file}: {field}_token_id={number!r}, of {len(tokens)} tokens")
            config[f"{role}_token"] = tokens[number]
    if add_bos and (bos := config.get("bos_token")) is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", None, [(bos, number)])
    if (template := fields.get("tokenizer.chat_template")) is not None:
        if not isinstance(template, str):
            raise UserError(f"{file}: its chat template is {template!r}, expected a text")
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": text.encode(),
    }
