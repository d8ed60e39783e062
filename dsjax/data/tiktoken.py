"""Kimi's tokenizer, read from its tiktoken file; the Python code beside it is never run.

Kimi-K2 and Moonlight come without a tokenizer.json. Their `tiktoken.model` has the pieces of text,
a line for each: its bytes in base64, a space, its rank, which is its id. What stands for no text
has the 256 ids after them, by the names that `added_tokens_decoder` in tokenizer_config.json gives
and `<|reserved_token_ID|>` where it gives none.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dsjax.data.byte_level import CHARACTER_OF
from dsjax.errors import UserError, one_line
from dsjax.small_files import read_json, read_small

TIKTOKEN = "tiktoken.model"

CLASS = "TikTokenTokenizer"
"""What tokenizer_config.json calls the released code, whose way to cut text is the one below."""

RESERVED = 256
"""Ids after the pieces. The code of some releases names two more, for which no model has logits."""

MAX_LINE_BYTES = 2_048
"""The longest line of the released file has some 200 bytes."""

# Chinese stands apart; a word takes one character before it along, begins with capitals or has
# none, and keeps its contraction; digits come in threes; a line's end keeps the blanks before it.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"\p{Han}+",
    f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
    f"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip
"""How text is cut before pieces are joined."""


def read_tiktoken(file: Path) -> Tokenizer:
    """The tokenizer of a tiktoken file and of the tokenizer_config.json beside it.

    Text becomes the ids that the released code gives it, but for one thing: that code cuts runs of
    more than 25,000 characters without a blank, and text every 400,000 characters; this does not.

    Raises:
        UserError: a file is missing or damaged, or belongs to a tokenizer that cuts text otherwise.
    """
    ranks = _read_ranks(file)
    added = _read_added(file.with_name("tokenizer_config.json"), first=len(ranks))
    vocabulary = {_spell(piece): rank for piece, rank in ranks.items()}
    # A stretch of text that is a piece becomes that piece, however it would be joined.
    model = models.BPE(vocab=vocabulary, merges=list(_merges(ranks)), ignore_merges=True)
    tokenizer = Tokenizer(model)
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in enumerate(added, len(ranks)):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise UserError(
                f"{file.with_name('tokenizer_config.json')}: {number} is {token.content!r}, which "
                "is a piece of text or another token too; expected a name of its own"
            )
    return tokenizer


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that makes a third, in the order of what they make.

    tiktoken joins the neighbours that make the piece of lowest rank, the first of them. While both
    ends of a piece stay where they are, it is made the same way in every text: so of the pairs that
    make it only one ever meets, and it does not matter in which order they stand here.
    """
    spelled = {piece: _spell(piece) for piece in ranks}
    for piece in sorted(ranks, key=ranks.__getitem__):
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in ranks and right in ranks:
                yield spelled[left], spelled[right]


def _spell(piece: bytes) -> str:
    return "".join(map(CHARACTER_OF.__getitem__, piece))


# ---------------------------------------------------------------------------------------------
# The two files
# ---------------------------------------------------------------------------------------------


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Rank of every piece: each from 0 on once, and every single byte among them."""
    data = read_small(file)
    lines = [(n, line) for n, line in enumerate(data.splitlines(), start=1) if line]
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    for number, line in lines:
        piece, rank = _parse(line, where=f"{file}: line {number}")
        if piece in ranks:
            raise UserError(
                f"{file}: line {number}: the piece of rank {ranks[piece]} once more; expected "
                "every piece once"
            )
        if rank in seen or rank >= len(lines):
            before = f", as on line {seen[rank]}" if rank in seen else ""
            raise UserError(
                f"{file}: line {number}: rank {rank}{before}; expected every rank from 0 to "
                f"{len(lines) - 1} once"
            )
        ranks[piece], seen[rank] = rank, number
    for byte in range(0x100):
        if bytes([byte]) not in ranks:
            raise UserError(f"{file}: no line has the byte {byte:#04x}; expected all 256 bytes")
    return ranks


def _parse(line: bytes, where: str) -> tuple[bytes, int]:
    """The piece and the rank of one line."""
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: {len(line):,} bytes long; expected at most {MAX_LINE_BYTES:,}")
    fields = line.split(b" ")
    if len(fields) != 2 or not fields[1].isdigit():
        found = line[:40].decode("utf-8", "replace")
        raise UserError(f"{where}: {found!r}; expected a piece in base64, a space and a rank")
    try:
        piece = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise UserError(f"{where}: not the base64 expected here: {one_line(error)}") from None
    if not piece:
        raise UserError(f"{where}: a piece without bytes; expected at least one")
    return piece, int(fields[1])


def _read_added(config: Path, first: int) -> list[AddedToken]:
    """What has the ids from `first` on, in their order."""
    described = _read_config(config).get("added_tokens_decoder")
    if not isinstance(described, dict):
        raise UserError(f"{config}: expected added_tokens_decoder, names of tokens by their ids")
    named: dict[int, AddedToken] = {}
    for key, token in described.items():
        number = int(key) if key.isdecimal() and key.isascii() and len(key) < 20 else -1
        if not first <= number < first + RESERVED:
            raise UserError(
                f"{config}: added_tokens_decoder names the id {key[:20]!r}; expected ids from "
                f"{first} to {first + RESERVED - 1}, those after the pieces"
            )
        match token:
            case {"content": str(content)} if content and type(token.get("special", False)) is bool:
                special = token.get("special", False)
                named[number] = AddedToken(content, special=special, normalized=False)
            case _:
                raise UserError(
                    f"{config}: added_tokens_decoder: {key}: expected an object with content, a "
                    "text, and special, true or false"
                )
    ids = range(first, first + RESERVED)
    return [named.get(number) or _reserved(number) for number in ids]


def _reserved(number: int) -> AddedToken:
    return AddedToken(f"<|reserved_token_{number}|>", special=True, normalized=False)


def _read_config(config: Path) -> dict[str, Any]:
    if not config.is_file():
        raise UserError(
            f"{config}: no such file; {TIKTOKEN} needs it beside it, for the names of its special "
            "tokens"
        )
    tree = read_json(config)
    if (found := tree.get("tokenizer_class")) != CLASS:
        raise UserError(
            f"{config}: tokenizer_class is {found!r}; {TIKTOKEN} is read as Kimi's {CLASS} reads "
            "it, and others cut text in ways not known here"
        )
    return tree
