"""Kimi's tokenizer, read from the `tiktoken.model` that it is released as. No code of it is run.

Each line of the file is a token in base64 and its rank, which is its id. Behind the ranks come 256
special tokens, some of them named in `tokenizer_config.json`. How text is cut before, the file does
not say: that stands in the code beside it, and here.

Differs from that code: text is not cut every 400,000 characters, nor within a run of more than
25,000 blanks or of anything but blanks.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from dsjax.data.byte_level import spell
from dsjax.errors import UserError
from dsjax.small_files import read_json, read_small

FILE = "tiktoken.model"

SPECIAL_TOKENS = 256

# Chinese by itself; words, by whether they end or begin with small letters, with the character
# before them and what English shortens; digits in threes; punctuation, lines, blanks.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_SHORTENED}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_SHORTENED}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def read_tiktoken(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in `file`, with the special tokens that the config beside it names.

    Raises:
        UserError: a line is not a token and its rank, a single byte is missing, or a special token
            has an id that is none of theirs.
    """
    ranks = _read_ranks(file)
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    # The library numbers them as they come.
    backend.add_tokens(_special_tokens(len(ranks), file.with_name("tokenizer_config.json")))
    if backend.get_vocab_size() != len(ranks) + SPECIAL_TOKENS:
        raise UserError(f"{file}: a special token is spelled like another token; fetch it again")
    return backend


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Every token's bytes, in the order of their ranks, which are 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_small(file).splitlines(), 1):
        encoded, _, rank = line.partition(b" ")
        try:
            token = binascii.a2b_base64(encoded, strict_mode=True)
        except binascii.Error:
            token = b""
        if not token or token in ranks or rank != b"%d" % len(ranks):
            raise UserError(
                f"{file}: line {number} is {line[:80].decode(errors='replace')!r}; expected a new "
                f"token in base64, a blank, and {len(ranks)}; fetch the file again"
            )
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{file}: has no token for the byte {missing[0]}; fetch it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every two tokens that are a third one together, in the order of the third one's rank."""
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        halves = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _special_tokens(begin: int, config: Path) -> list[AddedToken]:
    """Those from the id `begin` on, by the names in the config, or by their numbers."""
    described = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    names: dict[int, tuple[str, bool]] = {
        number: (f"<|reserved_token_{number}|>", True)
        for number in range(begin, begin + SPECIAL_TOKENS)
    }
    for key, token in described.items() if isinstance(described, dict) else ():
        number = _special_id(key, token, names, config)
        names[number] = token["content"], token.get("special", True)
    return [
        AddedToken(name, normalized=False, special=special is not False)
        for name, special in names.values()
    ]


def _special_id(key: str, token: Any, names: dict[int, Any], config: Path) -> int:
    """The id of a named token, which must be one of `names`."""
    described = isinstance(token, dict) and isinstance(token.get("content"), str)
    if not described or not key.isascii() or not key.isdigit() or int(key[:9]) not in names:
        raise UserError(
            f"{config}: added_tokens_decoder has {token!r} under {key!r}; expected an object with "
            f"its content, under a number from {min(names)} to {max(names)}"
        )
    return int(key)
