"""Conversations from JSONL, JSON, CSV and parquet, checked while they are read.

A row is one of

    {"messages": [{"role": ..., "content": ..., "reasoning_content": ..., "trained": ...}, ...]}
    {"prompt": TEXT OR MESSAGES, "completion" or "response": TEXT OR MESSAGES}

`reasoning_content` and `trained` may be missing; vLLM calls the former `reasoning`, others
`thinking`, and so may a row. Other keys of a row are not looked at. What is trained are the
assistant's messages, but those with `"trained": false` and those of a `prompt`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dsjax.data.files import find_files
from dsjax.data.records import Row, read_rows
from dsjax.errors import UserError

EXPECTED = "expected `messages`, or `prompt` and `completion` or `response`"
COMPLETIONS = ("completion", "response")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


class Conversation(NamedTuple):
    """Messages as a chat template takes them, and which of them are trained."""

    messages: list[dict[str, str]]
    trained: list[bool]
    where: str
    """File and line."""

    @property
    def question(self) -> str:
        """What stands before the first answer that is trained, as a text to compare by."""
        return json.dumps(self.messages[: self.trained.index(True)], sort_keys=True)


def read_conversations(paths: Sequence[str]) -> list[Conversation]:
    """All conversations of the files that globs match, each of them once.

    Raises:
        UserError: no file, or a row that is no conversation; the message names its line.
    """
    found: dict[str, Conversation] = {}
    for path in paths:
        for file in find_files(path, "data.paths"):
            for where, row in read_rows(file.path):
                one = read_conversation(row, where)
                found.setdefault(json.dumps(one[:2], sort_keys=True), one)
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no conversation in it")
    return list(found.values())


def hold_out(
    conversations: Iterable[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on, and those held out: all answers to a question are on the same side.

    Raises:
        UserError: one side has none.
    """
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    for one in conversations:
        digest = hashlib.blake2b(one.question.encode(), digest_size=8).digest()
        is_out = int.from_bytes(digest, "big") < fraction * 2**64
        (held_out if is_out else train).append(one)
    if not train or (fraction > 0 and not held_out):
        raise UserError(
            f"data.held_out_fraction={fraction:g} holds out {len(held_out)} of "
            f"{len(train) + len(held_out)} conversations; choose one that leaves some on both sides"
        )
    return train, held_out


def read_conversation(row: Row, where: str) -> Conversation:
    """Check a row, and bring it into one form.

    Raises:
        UserError: it is no conversation, or has no answer to train; the message begins with
            `where`.
    """
    try:
        given = {key: value for key, value in row.items() if value is not None}
        completion = next((key for key in COMPLETIONS if key in given), None)
        if "messages" in given:
            found = _messages(given["messages"], "messages")
        elif "prompt" in given and completion is not None:
            asked = _either(given["prompt"], "prompt", "user")
            found = [(message, False) for message, _ in asked]
            found += _either(given[completion], completion, "assistant")
        else:
            raise ValueError(f"the keys are {', '.join(sorted(given)) or 'none'}; {EXPECTED}")
        if not any(trained for _, trained in found):
            raise ValueError("no answer of the assistant is to be trained; leave the row out")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Conversation([message for message, _ in found], [trained for _, trained in found], where)


def _either(value: Any, key: str, role: str) -> list[tuple[dict[str, str], bool]]:
    """The messages under a key; a text is one message."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, key)


def _messages(value: Any, key: str) -> list[tuple[dict[str, str], bool]]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{key} is {found}; expected a list of messages")
    return [_message(item, f"{key}[{place}]") for place, item in enumerate(value)]


def _message(item: Any, where: str) -> tuple[dict[str, str], bool]:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is a {type(item).__name__}; expected a message")
    # parquet spells a key that is missing in one row, and there in another, by null.
    given = {key: value for key, value in item.items() if value is not None}
    trained = given.pop("trained", True)
    if not isinstance(trained, bool):
        raise ValueError(f"{where}.trained is {trained!r}; expected true or false")
    for key in ("role", "content"):
        if key not in given:
            raise ValueError(f"{where} has no {key}")
    for key, text in given.items():
        if not isinstance(text, str):
            raise ValueError(f"{where}.{key} is a {type(text).__name__}; expected a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}.{key} holds half of a surrogate pair") from None
    thoughts = [given.pop(key) for key in THOUGHTS if key in given]
    if len(set(thoughts)) > 1:
        raise ValueError(f"{where} has several thoughts, by {', '.join(THOUGHTS)}; give one")
    if thoughts:
        given["reasoning_content"] = thoughts[0]
    return given, trained and given["role"] == "assistant"
