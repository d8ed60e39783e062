"""A checkpoint's chat template: messages in, the tokens of a prompt out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError

from dsjax.data.template_sandbox import TooMuch, make_environment, run
from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import Tokenizer
from dsjax.data.tokenizer_files import CONFIG
from dsjax.errors import UserError, one_line
from dsjax.small_files import MAX_JSON_BYTES, read_json_if_there, read_small

THINK_SWITCHES = ("enable_thinking", "thinking")
"""What templates call the variable that switches thoughts: Qwen3's, and DeepSeek-V3.1's."""

_THINK_TAG = re.compile("(</?think>)")
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates look for the thought of a message."""
_NOTHING = re.compile("((?!))")


class TemplateError(Exception):
    """The template does not take these messages; one line."""


class HarmfulTemplateError(TemplateError):
    """The template does too much, or reaches out of its sandbox."""


class ChatTemplate:
    """The template of one checkpoint, with its tokenizer.

    A template is a program that came with weights, and never one that came with a request. It runs
    as in `transformers`: in jinja's sandbox, with `raise_exception`, `strftime_now`, `tojson`,
    `{% generation %}` and the loop controls. Its loops and recursions end after `MAX_STEPS`, its
    output after `MAX_CHARACTERS`. Its memory has no bound: a template can double a text with `~`
    until it fills the machine, so serve weights only of makers that you trust not to.

    Args:
        source: jinja2.
        names: what the template may call special tokens by, such as `bos_token`.

    Raises:
        UserError: the source is no jinja2.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, Any]):
        self.source = source
        self._tokenizer = tokenizer
        self._names = dict(names)
        try:
            self._template = make_environment().from_string(source)
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
        """Return the template with the variables of `THINK_SWITCHES` set."""
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
        # White space that is an added token stands for itself, in messages too.
        return {spelling[0] for spelling in self._tokenizer.added_tokens if spelling.strip()}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompting: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The template's text for `messages`; see `encode` for why this is not yet a prompt.

        Args:
            messages: what the template gets, without keys of which the value is None.
            prompting: whether the beginning of an answer is added.
            tools: JSON schemas of functions; None, and defined, where there are none.
            documents: objects with title and text; the same.

        Raises:
            TemplateError: the template refuses the messages, fails on them or does too much.
        """
        parts = self._template.generate(
            **self._names,
            messages=[_as_templates_expect(message) for message in messages],
            tools=tools,
            documents=documents,
            add_generation_prompt=prompting,
        )
        try:
            return run(parts)
        except TooMuch as error:
            raise HarmfulTemplateError(f"the chat template {error}") from None
        except SecurityError as error:
            problem = f"the chat template reaches out of its sandbox: {_short(error)}"
            raise HarmfulTemplateError(problem) from None
        except Exception as error:  # whatever a template does wrong
            problem = f"the chat template does not take these messages: {_short(error)}"
            raise TemplateError(problem) from None


def _as_templates_expect(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers gives it: no key is None, and a thought has all of its names."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[key] for key in _THOUGHTS if key in given), None)
    if thought is None:
        return given
    return {"thinking": thought, **given, "reasoning_content": thought}


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


def _short(error: Exception) -> str:
    return one_line(error)[:200] or type(error).__name__


def read_chat_template(home: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in a tokenizer's folder, None where there is none.

    It is in chat_template.jinja or additional_chat_templates/, in tokenizer_config.json, or in
    chat_template.json, in this order. Of several it is the one called default, as in
    `transformers`.

    Raises:
        UserError: it is no template, or one that takes no messages; or none is called default.
    """
    source = _named_files(home)
    for name in (CONFIG, "chat_template.json"):
        source = source or read_json_if_there(home / name).get("chat_template")
    if isinstance(source, list):
        items = [item for item in source if isinstance(item, dict)]
        source = {str(item.get("name")): item.get("template") for item in items}
    if isinstance(source, dict) and source:
        if "default" not in source:
            raise UserError(
                f"{home}: has the chat templates {', '.join(sorted(source))}, and none called "
                "default; save the one to be used as chat_template.jinja"
            )
        source = source["default"]
        if source is None:
            raise UserError(f"{home}: chat_template is no text")
    if not source:
        return None
    if not isinstance(source, str):
        raise UserError(f"{home}: chat_template is no text")
    return make_chat_template(source, tokenizer, home)


def _named_files(home: Path) -> dict[str, str]:
    """Templates that have files of their own, by name."""
    file = home / "chat_template.jinja"
    found = {"default": _read_text(file)} if file.is_file() else {}
    folder = home / "additional_chat_templates"
    more = sorted(folder.glob("*.jinja")) if folder.is_dir() else []
    return found | {file.name.removesuffix(".jinja"): _read_text(file) for file in more}


def read_template_file(file: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template in a file of its own; raises as `read_chat_template` does."""
    return make_chat_template(_read_text(file), tokenizer, file)


def make_chat_template(source: str, tokenizer: Tokenizer, where: Path) -> ChatTemplate:
    """A template that calls special tokens as released ones do; an error names `where`."""
    try:
        template = ChatTemplate(source, tokenizer, tokenizer.named_tokens)
        template.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return template


def _read_text(path: Path) -> str:
    try:
        return read_small(path, MAX_JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
