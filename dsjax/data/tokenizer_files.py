"""Read tokenizer.json and the files next to it; added and special tokens as in transformers.

Which tokens are added, and with which flags, stands in up to four files: `added_tokens` of
tokenizer.json; `added_tokens_decoder` of tokenizer_config.json; where the latter is missing,
special_tokens_map.json and added_tokens.json, which transformers wrote before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dsjax.errors import UserError, one_line
from dsjax.small_files import is_text, read_json_if_there, read_small

CONFIG = "tokenizer_config.json"

SAVED_BEFORE = {"tokenizer_class", "bos_token", "eos_token"}
"""All keys of the tokenizer_config.json of runs that were saved without `add_bos_token`."""

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_LISTS = ("additional_special_tokens", "extra_special_tokens")

# A word takes one character before it along (a space, a dot, an underscore); punctuation takes the
# line's end and the next line's indentation along, all but the blank that its first word takes.
# One `[\r\n]` is enough after `\s*`, which has taken the line ends before it.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+(?:(?>[\r\n]+)[ \t]*(?=[ \t]))?"
    r"|\s*[\r\n][ \t]*(?=[ \t])"
    r"|\s*[\r\n]"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""How the tokenizers of our own runs split text, in time linear in its length."""


# Patterns that take quadratic time on some runs of white space, and others of the same matches.
_QUADRATIC = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+(?:[\r\n]+[ \t]*(?=[ \t]))?"
    r"|\s*[\r\n]+[ \t]*(?=[ \t])"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_LINEAR = {
    # Of our own runs, until they were trained with WORDS: tries every pair of line ends.
    _QUADRATIC: WORDS,
    # Of DeepSeek-LLM, -Coder and -V2: tries every beginning of a run.
    r"\s+$": r"(?<!\s)\s+$",
}


def read_config(file: Path) -> dict[str, Any]:
    """The settings next to a tokenizer's file; special_tokens_map.json is merged where it counts.

    Raises:
        UserError: a file is damaged.
    """
    config = read_json_if_there(file.with_name(CONFIG))
    if "added_tokens_decoder" in config:
        return config
    return config | read_json_if_there(file.with_name("special_tokens_map.json"))


def read_backend(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, and add the tokens that only the files next to it have.

    Args:
        file: the tokenizer.json.
        config: what `read_config` returns for it.

    Returns:
        The tokenizer of the `tokenizers` library, without truncation and padding.

    Raises:
        UserError: a file is damaged, or gives a token another id than tokenizer.json.
    """
    data = read_small(file)
    for pattern, linear in _LINEAR.items():
        data = data.replace(_quoted(pattern).encode(), _quoted(linear).encode())
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises nothing more precise
        raise UserError(f"{file}: cannot be read as a tokenizer: {one_line(error)}") from None
    _add_tokens(backend, config, file)
    _mark_special(backend, config)
    return backend


def as_in_file(canonical: str) -> str:
    """A tokenizer's JSON with the patterns that `read_backend` replaced.

    The digest of a tokenizer is that of its file: with another one a run is not resumed.
    """
    for pattern, linear in _LINEAR.items():
        canonical = canonical.replace(_quoted(linear), _quoted(pattern))
    return canonical


def named_token(config: dict[str, Any], key: str) -> Any:
    """The spelling under `bos_token` and the like: a text, or an object with it as `content`."""
    token = config.get(key)
    return token.get("content", token) if isinstance(token, dict) else token


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Spellings of special tokens by their keys, `pad_token` and the like."""
    named = {key: named_token(config, key) for key in config if key.endswith("_token")}
    return {key: name for key, name in named.items() if is_text(name)}


def _quoted(pattern: str) -> str:
    return json.dumps(pattern)


# ---------------------------------------------------------------------------------------------
# Added tokens
# ---------------------------------------------------------------------------------------------


def _add_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], file: Path) -> None:
    """Add what the config adds, each at its own id; its flags win over tokenizer.json's."""
    known = _added(backend)
    declared = _declared(config, file) if "added_tokens_decoder" in config else _legacy(known, file)
    for number, token, source in sorted(declared, key=lambda found: found[0]):
        before = backend.token_to_id(token.content)
        if token.content not in known or _flags(known[token.content]) != _flags(token):
            backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != number:
            verb = "would get" if before is None else "has"
            raise UserError(
                f"{source}: {token.content!r} has the id {number}, but {verb} {found} by "
                f"{file.name}; take both files from the same release"
            )


def _declared(config: dict[str, Any], file: Path) -> Iterator[tuple[int, AddedToken, Path]]:
    """Ids and tokens of `added_tokens_decoder`, and the file that it stands in."""
    source = file.with_name(CONFIG)
    described = config["added_tokens_decoder"]
    if not isinstance(described, dict):
        raise UserError(f"{source}: expected added_tokens_decoder to be tokens by their ids")
    for key, token in described.items():
        where = f"{source}: added_tokens_decoder: {key}"
        yield added_id(key, source), added_token(token, where), source


def _legacy(known: dict[str, AddedToken], file: Path) -> Iterator[tuple[int, AddedToken, Path]]:
    """Those of added_tokens.json that tokenizer.json has not."""
    source = file.with_name("added_tokens.json")
    for content, number in read_json_if_there(source).items():
        if type(number) is not int or number < 0 or not is_text(content) or not content:
            raise UserError(f"{source}: {content!r} is {number!r}; expected names with their ids")
        if content not in known:
            yield number, AddedToken(content, normalized=True), source


def added_id(key: str, source: Path) -> int:
    """The id that a key of `added_tokens_decoder` spells."""
    if not (key.isdecimal() and key.isascii() and len(key) < 10):
        raise UserError(f"{source}: added_tokens_decoder: expected ids as keys, found {key[:20]!r}")
    return int(key)


def added_token(described: Any, where: str) -> AddedToken:
    """One token as `added_tokens_decoder` describes it.

    Raises:
        UserError: it has no content, or a flag that is neither true nor false.
    """
    content = described.get("content") if isinstance(described, dict) else None
    if not is_text(content) or not content:
        raise UserError(f"{where}: expected an object with content, a text")
    flags = {name: described[name] for name in _FLAGS if name in described}
    for name, value in flags.items():
        if type(value) is not bool:
            raise UserError(f"{where}: {name} is {value!r}; expected true or false")
    return AddedToken(content, **flags)


def _mark_special(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Make the tokens that the config names special.

    Those of its lists are added where the vocabulary lacks them, as transformers does. Others, such
    as a pad_token, stand for no text: without an id of their own they are left out.
    """
    known = _added(backend)
    listed = [item for key in _LISTS for item in _items(config.get(key))]
    for content in dict.fromkeys([*named_tokens(config).values(), *listed]):
        found = known.get(content)
        if found is None and backend.token_to_id(content) is None and content not in listed:
            continue
        if found is None or not found.special:
            flags = {"normalized": False} if found is None else _flags(found)
            backend.add_special_tokens([AddedToken(content, **(flags | {"special": True}))])


def _items(listed: Any) -> list[Any]:
    values = listed.values() if isinstance(listed, dict) else listed
    return list(_spellings(values)) if isinstance(listed, list | dict) else []


def _spellings(values: Iterable[Any]) -> Iterator[str]:
    """The spellings of tokens that are texts, or objects with the text as `content`."""
    for value in values:
        content = value.get("content") if isinstance(value, dict) else value
        if is_text(content) and content:
            yield content


def _added(backend: tokenizers.Tokenizer) -> dict[str, AddedToken]:
    return {token.content: token for token in backend.get_added_tokens_decoder().values()}


def _flags(token: AddedToken) -> dict[str, bool]:
    return {name: getattr(token, name) for name in _FLAGS}
