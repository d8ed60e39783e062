"""A checkpoint's chat template: messages in, the tokens of a prompt out."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError, one_line
from dsjax.small_files import MAX_JSON_BYTES, read_json_if_there, read_small

MAX_STEPS = 2_000_000
"""Lines of Python that one rendering may run: some 200 for a message of DeepSeek's template."""
MAX_CHARACTERS = 2**24
MAX_PRODUCT = 4096
"""Bits of a number that a template multiplies, or characters of a text that it repeats."""

THINK_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that switches thoughts: Qwen3's, and DeepSeek-V3.1's."""

_THINK_TAG = re.compile("(</?think>)")
_NOTHING = re.compile("((?!))")


class TemplateError(Exception):
    """The template does not take these messages; one line."""


class HarmfulTemplateError(TemplateError):
    """The template does too much, or reaches out of its sandbox."""


class ChatTemplate:
    """The template of one checkpoint, with its tokenizer.

    A template is a program that came with weights, and never one that came with a request. It runs
    as in `transformers`: in jinja's sandbox, with `raise_exception`, `strftime_now`, `tojson` and
    the loop controls. Its loops and recursions end after `MAX_STEPS`, its output after
    `MAX_CHARACTERS`. Its memory has no bound: a template that doubles a text thirty times over
    fills the machine, so weights are served from those whom one trusts not to.

    Args:
        source: jinja2.
        names: what the template may call special tokens by, such as `bos_token`.

    Raises:
        UserError: the source is no jinja2.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, Any]):
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            # The optimizer would compute constants while loading, without any limit.
            optimized=False,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.source = source
        self._tokenizer = tokenizer
        self._names = dict(names)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a source nested too deeply is a RecursionError
            raise UserError(f"the chat template cannot be read: {_short(error)}") from None

    def check(self) -> None:
        """Try the template on one message, before anybody is served with it.

        Raises:
            UserError: it does not come to an end, or reaches out of its sandbox. One that only
                does not take this message may take others.
        """
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except HarmfulTemplateError as error:
            raise UserError(str(error)) from None
        except TemplateError:
            pass

    def with_thought(self, think: bool) -> ChatTemplate:
        """Return the same template, told whether to think, by the variables in `THINK_SWITCHES`."""
        names = {**self._names, **dict.fromkeys(THINK_SWITCHES, think)}
        return ChatTemplate(self.source, self._tokenizer, names)

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of `messages` and of the beginning of the answer.

        Special tokens come from the template's own text alone. In the messages their spelling
        means its characters: whoever asks cannot end his turn and begin the system's. The think
        tags of an assistant's message are an exception, since templates look for them there.

        To tell the two apart after rendering, a character with which an added token could begin
        (<, as a rule) is rendered as another, which occurs in no message and stands for it: a
        template may cut, trim, join and quote what it is given.

        Raises:
            TemplateError: the template refuses the messages, fails on them or does too much.
        """
        stand_ins = _stand_ins(self._begins, messages)
        rendered = self.render([_disguise(message, stand_ins) for message in messages])
        back = {ord(stand_in): character for character, stand_in in stand_ins.items()}
        literal = {place for place, character in enumerate(rendered) if ord(character) in back}
        return encode_with_added_tokens(self._tokenizer, rendered.translate(back), literal)

    def encode_answer(self, parts: Sequence[str]) -> list[int]:
        """The tokens of what an assistant writes: text, a tag, text, a tag, and so on.

        A tag is an added token; in the texts their spelling means its characters, as in `encode`.
        """
        ids: list[int] = []
        for place, part in enumerate(parts):
            begins = self._begins if place % 2 == 0 else set()
            literal = {i for i, character in enumerate(part) if character in begins}
            ids += encode_with_added_tokens(self._tokenizer, part, literal)
        return ids

    @cached_property
    def end_of_answer(self) -> list[int]:
        """The tokens with which the template ends a message of the assistant, found by rendering.

        Raises:
            TemplateError: it does not write what it is given, or takes no such message.
        """
        mark = chr(0xF0000)  # a character of private use, which no template writes by itself
        question = {"role": "user", "content": "Hello"}
        answer = {"role": "assistant", "content": mark}
        rendered = self.render([question, answer], prompting=False)
        _, found, after = rendered.partition(mark)
        if not found or mark in after:
            raise TemplateError("the chat template does not write an assistant's message as it is")
        return encode_with_added_tokens(self._tokenizer, after)

    @cached_property
    def _begins(self) -> set[str]:
        """Characters with which an added token could begin."""
        return {spelling[0] for spelling in self._tokenizer.added_tokens if spelling}

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompting: bool = True) -> str:
        """The template's text for `messages`; see `encode` for why this is not yet a prompt.

        Without `prompting` the beginning of an answer is left out.
        """
        parts = self._template.generate(
            **self._names, messages=messages, add_generation_prompt=prompting
        )
        try:
            return _run(parts)
        except _TooMuch as error:
            raise HarmfulTemplateError(f"the chat template {error}") from None
        except SecurityError as error:
            problem = f"the chat template reaches out of its sandbox: {_short(error)}"
            raise HarmfulTemplateError(problem) from None
        except Exception as error:  # whatever a template does wrong
            problem = f"the chat template does not take these messages: {_short(error)}"
            raise TemplateError(problem) from None


def _stand_ins(begins: set[str], messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each character one of the private use planes that is in no message."""
    used = {c for message in messages for text in message.values() for c in text}
    private = (chr(number) for number in range(0xF0000, 0x110000))
    free = itertools.islice((c for c in private if c not in used), len(begins))
    stand_ins = dict(zip(sorted(begins), free, strict=False))
    if len(stand_ins) < len(begins):
        raise TemplateError("the messages use every character that there is")
    return stand_ins


def _disguise(message: Mapping[str, str], stand_ins: Mapping[str, str]) -> dict[str, str]:
    """A copy of the message with stand-ins, but for the role and an assistant's think tags."""
    table = str.maketrans(dict(stand_ins))
    spared = _THINK_TAG if message["role"] == "assistant" else _NOTHING
    return {
        key: value if key == "role" else _outside(spared, value, lambda text: text.translate(table))
        for key, value in message.items()
    }


def _outside(spared: re.Pattern[str], text: str, change: Callable[[str], str]) -> str:
    """Change `text` between what `spared` matches."""
    parts = spared.split(text)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


# ---------------------------------------------------------------------------------------------
# The sandbox
# ---------------------------------------------------------------------------------------------


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no single operation takes for ever."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply and raise, as long as the result stays small."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**":
            size = _size(left) * abs(right) if numbers else 1
        elif numbers:
            size = _size(left) + _size(right)
        else:  # a text, so many times
            size = max(_size(left) * _times(right), _size(right) * _times(left))
        if size > MAX_PRODUCT:
            raise _TooMuch(f"does too much: the result of {operator} would be too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 1


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 1


class _TooMuch(BaseException):
    """Not an Exception, so that no filter of jinja's takes it for a value's mistake."""


def _run(parts: Iterable[str]) -> str:
    """Join the parts, and stop after so many lines of Python or so many characters.

    A loop that writes nothing gives no chance to look at a clock, and a thread cannot be killed;
    but an interpreter that is asked to trace this thread tells of every line in it.
    """
    steps = characters = 0
    written: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise _TooMuch("does not come to an end")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for part in parts:
            written.append(part)
            characters += len(part)
            if characters > MAX_CHARACTERS:
                raise _TooMuch(f"writes more than {MAX_CHARACTERS} characters")
    finally:
        sys.settrace(before)
    return "".join(written)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own writes < as a code, for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _short(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__


def read_chat_template(home: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in a tokenizer's folder, None where there is none.

    It is chat_template.jinja, chat_template.json, or what tokenizer_config.json has, in this order,
    as in `transformers`.

    Raises:
        UserError: it is no template, or one that takes no messages.
    """
    file = home / "chat_template.jinja"
    source = _read_text(file) if file.is_file() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = source or read_json_if_there(home / name).get("chat_template")
    if isinstance(source, list):  # several, by name
        named = (item for item in source if isinstance(item, dict))
        source = next((i.get("template", i) for i in named if i.get("name") == "default"), None)
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{home}: chat_template is no text")
    return make_chat_template(source, tokenizer, home)


def read_template_file(file: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template in a file of its own; raises as `read_chat_template` does."""
    return make_chat_template(_read_text(file), tokenizer, file)


def make_chat_template(source: str, tokenizer: Tokenizer, where: Path) -> ChatTemplate:
    """A template that calls special tokens as released ones do; an error names `where`."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {key: "" if i is None else tokenizer.decode([i]) for key, i in ids.items()}
    try:
        template = ChatTemplate(source, tokenizer, names)
        template.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return template


def _read_text(path: Path) -> str:
    try:
        return read_small(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
