"""The one exception that means: the user's input is wrong, not our code."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST = 2000
"""Characters of a message: it quotes what a file says, and a file may say anything."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message names what was found, what was expected and what to do. It is one line of printable
    text, whatever a damaged or hostile file put into it. The command line prints it without a
    traceback and exits with code 2.
    """

    def __init__(self, message: object):
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """Any message on a single line: cut in its middle if it is long, and safe for a terminal.

    >>> one_line("two\\nlines, \\x1b[31mred")
    'two lines, \\\\x1b[31mred'
    """
    text = " ".join(str(message).split())
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


_HUB = re.compile(r"(?:https?:/+(?:huggingface\.co|hf\.co)/)?(\w[\w.-]*)/(\w[\w.-]*)/?", re.ASCII)
_FILES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".parquet", ".txt", ".gguf", ".safetensors")


def hub_hint(path: object, kind: str = "model") -> str:
    """How to download what a path names that is not there, if it reads like an id of the hub.

    Args:
        path: as it was given.
        kind: what was expected there, "model" or "dataset".

    Returns:
        A part of a message, or "" where the path is no id or its first folder is there.

    >>> hub_hint("openai-community/gpt2")[:70]
    '; if that is a model of the Hugging Face hub, download it first: hf do'
    """
    found = _HUB.fullmatch(str(path))
    if found is None or found[2].endswith(_FILES) or Path(found[1]).exists() or found[1] == "runs":
        return ""
    repo = "" if kind == "model" else f" --repo-type {kind}"
    return (
        f"; if that is a {kind} of the Hugging Face hub, download it first: hf download "
        f"{found[1]}/{found[2]}{repo} --local-dir {found[2]}, and name that folder"
    )
