"""The command line of serve.py: what each verb takes. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsjax.places import as_path

Verbs = Any
"""What `add_subparsers` returns; argparse keeps its type to itself."""
Verb = Callable[[Namespace, "ModelOptions"], None]

UNITS = {"": 1} | {
    f"{prefix}{mark}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for mark, base in (("", 1000), ("i", 1024))
}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model is served, and in how much room."""

    checkpoint: Path
    """The directory of a run, or a Hugging Face folder."""
    name: str
    """What requests call it."""
    context: int | None = None
    """Most tokens of a sequence; None: 4,096, or what the model has if that is less."""
    rows: int = 8
    """Sequences that run at the same time."""
    memory: int | None = None
    """Bytes of the cache; None: enough for `rows` sequences of full length."""
    dtype: str | None = None
    """float32 or bfloat16; None: as stored."""
    drafts: int = 1
    """Tokens that MTP drafts a step."""
    mesh: Mapping[str, int] | None = None
    """Sizes of mesh axes; None: one device."""

    @classmethod
    def of(cls, arguments: Namespace) -> ModelOptions:
        """What the command line says; a verb that lacks an option leaves it as it is here."""
        given = vars(arguments)
        found = {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}
        checkpoint = as_path(found.pop("checkpoint"))
        name = found.pop("name", None) or checkpoint.resolve().name
        return cls(checkpoint=checkpoint, name=name, **found)


def add_batch(verbs: Verbs, call: Verb) -> None:
    """`serve.py batch CHECKPOINT --input FILE --output FILE`."""
    verb = verbs.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer every request of a JSONL file in OpenAI's batch format. Stopped or "
        "killed, the same command goes on where it was. Answers come in the order in which they "
        "are done.",
    )
    _add_checkpoint(verb)
    verb.add_argument("--input", required=True, type=Path, metavar="FILE",
                      help="requests, a line each: custom_id, method, url, body")  # fmt: skip
    verb.add_argument("--output", required=True, type=Path, metavar="FILE",
                      help="answers; until all are there they are in FILE.partial")  # fmt: skip
    _add_name(verb)
    _add_room(verb)
    _add_model(verb)
    verb.set_defaults(call=call)


def add_http(verbs: Verbs, call: Verb) -> None:
    """`serve.py http CHECKPOINT --port 8000`."""
    verb = verbs.add_parser(
        "http",
        help="OpenAI's API on a port",
        description="Serve /v1/chat/completions and /v1/completions on a port, and a page to try "
        "them. Keys are read from --api-key-file and from the environment variable "
        "DSJAX_API_KEYS; without any, only this machine can reach the port.",
    )
    _add_checkpoint(verb)
    verb.add_argument("--host", default="127.0.0.1",
                      help="address to listen on (127.0.0.1: for this machine alone)")  # fmt: skip
    verb.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    verb.add_argument("--api-key-file", type=Path, metavar="FILE",
                      help="API keys, one a line; # begins a comment")  # fmt: skip
    verb.add_argument("--without-key", action="store_true",
                      help="anyone who reaches the port may use the model")  # fmt: skip
    _add_name(verb)
    _add_room(verb)
    _add_model(verb)
    verb.set_defaults(call=call)


def add_chat(verbs: Verbs, call: Verb) -> None:
    """`serve.py chat CHECKPOINT`."""
    verb = verbs.add_parser(
        "chat",
        help="talk in this terminal",
        description="Talk to the model in this terminal; /help says how. A model without a chat "
        "template continues what you type. From a pipe, each line is a message, and only the "
        "answers are printed.",
    )
    _add_checkpoint(verb)
    verb.add_argument("--temperature", type=_temperature, metavar="T",
                      help="how freely words are chosen; 0: always the likeliest (what the "
                      "checkpoint says, else 1)")  # fmt: skip
    _add_model(verb)
    verb.set_defaults(call=call, rows=1)


def _add_checkpoint(verb: ArgumentParser) -> None:
    verb.add_argument("checkpoint", type=Path, metavar="CHECKPOINT",
                      help="a run directory of train.py, or a Hugging Face folder")  # fmt: skip


def _add_name(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--name", help='what requests call the model, as "model" (the folder\'s name)'
    )


def _add_room(verb: ArgumentParser) -> None:
    verb.add_argument("--rows", type=int, default=8, metavar="N",
                      help="sequences that run at the same time (8)")  # fmt: skip
    verb.add_argument("--memory", type=_size, metavar="SIZE",
                      help="of the cache, such as 8GiB (all rows at full length)")  # fmt: skip


def _add_model(verb: ArgumentParser) -> None:
    verb.add_argument("--context", type=int, metavar="N",
                      help="most tokens of prompt and answer together (4096, or the model's own "
                      "limit where that is less)")  # fmt: skip
    verb.add_argument("--dtype", choices=("float32", "bfloat16"),
                      help="hold and compute in this (as stored)")  # fmt: skip
    verb.add_argument("--drafts", type=int, default=1, metavar="N",
                      help="tokens that MTP drafts a step, if the model has it (1)")  # fmt: skip
    verb.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...",
                      help="spread the model over all devices, such as expert=4,tensor=2 (one "
                      "device)")  # fmt: skip


def _size(text: str) -> int:
    """Bytes.

    >>> _size("8GiB"), _size("1.5 MB"), _size("4096")
    (8589934592, 1500000, 4096)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text)
    if found is None or found[2] not in UNITS:
        units = ", ".join(unit for unit in UNITS if unit)
        raise ArgumentTypeError(f"{text!r} is no size; expected a number and one of {units}")
    return int(float(found[1]) * UNITS[found[2]])


def _temperature(text: str) -> float:
    """A number that is one.

    >>> _temperature("0.6")
    0.6
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise ArgumentTypeError(f"{text!r} is no temperature; expected 0 to 100")
    return value


def mesh_sizes(text: str) -> dict[str, int]:
    """Sizes of mesh axes.

    >>> mesh_sizes("expert=4,tensor=2")
    {'expert': 4, 'tensor': 2}
    """
    if not re.fullmatch(r"\w+=[1-9]\d*(,\w+=[1-9]\d*)*", text):
        raise ArgumentTypeError(f"{text!r} is no mesh; expected such as expert=4,tensor=2")
    return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
