"""The jinja environment of chat templates: what transformers gives them, within bounds."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes, parser
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 2_000_000
"""Lines of Python that one rendering may run: some 200 for a message of DeepSeek's template."""
MAX_CHARACTERS = 2**24
"""Of the output, and of a text that is put together by `+`."""
MAX_PRODUCT = 4096
"""Bits of a number that a template multiplies, or characters of a text that it repeats."""


def make_environment() -> jinja2.Environment:
    """The environment that transformers' `apply_chat_template` renders in, with bounds."""
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        # The optimizer would compute constants while loading, without any limit.
        optimized=False,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class TooMuch(BaseException):
    """A bound was passed. Not an Exception, so that no filter of jinja's takes it for an error."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; it renders as its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """Read the tag, its body and `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block that is called, as in transformers: what it sets stays inside.
        return nodes.CallBlock(self.call_method("render"), [], [], body).set_lineno(line)

    def render(self, caller: Callable[[], str]) -> str:
        """The body."""
        return caller()


class _Dict:
    """`dict`, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As of the type."""
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be a name
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not have the attribute {name!r}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no single operation takes for ever."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply, raise and add, as long as the result stays small."""
        numbers = isinstance(left, int) and isinstance(right, int)
        limit = MAX_PRODUCT
        if operator == "+":
            size, limit = _size(left) + _size(right), MAX_CHARACTERS
        elif operator == "**":
            size = _size(left) * abs(right) if numbers else 1
        elif numbers:
            size = _size(left) + _size(right)
        else:  # a text, so many times
            size = max(_size(left) * _times(right), _size(right) * _times(left))
        if size > limit:
            raise TooMuch(f"does too much: the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 1


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 1


def run(parts: Iterable[str]) -> str:
    """Join the parts, and stop after so many lines of Python or so many characters.

    A loop that writes nothing gives no chance to look at a clock, and a thread cannot be killed;
    but a trace function is called for every line that this thread executes.

    Raises:
        TooMuch: a bound was passed.
    """
    steps = characters = 0
    written: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise TooMuch("does not come to an end")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for part in parts:
            written.append(part)
            characters += len(part)
            if characters > MAX_CHARACTERS:
                raise TooMuch(f"writes more than {MAX_CHARACTERS} characters")
    finally:
        sys.settrace(before)
    return "".join(written)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own writes < as a code, for web pages."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
