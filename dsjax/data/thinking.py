"""The reasoning parser: tells a model's thought from its content by <think> and </think>.

Serving, sampling, tuning, rewards and evaluation all use this one, as a stream or on a whole text.
It works on decoded text, so that a tag may be one token or several, and so that a stream and a
record of the same answer are split alike. DeepSeek's API answers with `reasoning_content` in
addition to `content`, and so do we. docs/serving.md compares the rules with those of vLLM and
SGLang:

    the prompt ends with <think>        the answer begins within a thought
    <think> first, after white space    opens a thought; dropped where the prompt has opened one,
                                        and where it is repeated
    the first </think> of a thought     ends it; any tag after it is text
    no </think>                         all of it is thought, and there is no content
    </think> where no thought is open   text, like a <think> behind other text
    newlines                            dropped at both ends of a thought, and between it and the
                                        content; content without a thought is kept as it is
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from dsjax.data.text import StopMatcher, TextStream

OPENED, CLOSED = "<think>", "</think>"

Field = Literal["text", "content", "reasoning_content"]
"""Where text belongs in a response; `text` is a completion's, which is not split."""

Piece = tuple[Field, str]

_TAG = re.compile("</?think>")


class ReasoningParser:
    """Splits text that comes in pieces, and returns each character as soon as its field is certain.

    A beginning of a tag is held back until it is whole or is none.

    Args:
        opened: the prompt has opened the thought.

    >>> parser = ReasoningParser(opened=False)
    >>> [parser.push(text) for text in ("\\n<thi", "nk>so", " it</th", "ink>\\n\\nis")]
    [[], [('reasoning_content', 'so')], [('reasoning_content', ' it')], [('content', 'is')]]
    """

    def __init__(self, opened: bool):
        self.field: Field | None = "reasoning_content" if opened else None
        """That of the next character; None while white space or a part of <think> decides."""
        self.has_thought = opened
        self._beginning = True
        self._blanks = ""
        """White space at the beginning, which is dropped if <think> follows."""
        self._held = ""
        self._trim = False
        """Newlines are dropped until something else comes."""
        self._newlines = 0
        """At the end of the thought so far."""

    def push(self, text: str) -> list[Piece]:
        """Add text; returns what is certain now, thought before content."""
        text, self._held = self._held + text, ""
        if self._beginning:
            text = self._begin(text)
        pieces: list[Piece] = []
        if self.field == "reasoning_content":
            thought, text = self._think(text)
            pieces.append(("reasoning_content", thought))
        if self.field == "content":
            pieces.append(("content", self._trimmed(text)))
        return [piece for piece in pieces if piece[1]]

    def finish(self) -> list[Piece]:
        """Return what was held back: the text has ended."""
        text, self._blanks, self._held = self._blanks + self._held, "", ""
        self._begun()
        if self.field == "reasoning_content":
            piece: Piece = "reasoning_content", self._shown(text)
        else:
            piece = "content", self._trimmed(text)
        return [piece] if piece[1] else []

    def _begin(self, text: str) -> str:
        """Drop opening tags and white space before them; return what follows, once it is known."""
        while True:
            rest = text.lstrip()
            self._blanks += text[: len(text) - len(rest)]
            if rest.startswith(OPENED):
                self.field, self.has_thought, self._blanks = "reasoning_content", True, ""
                text = rest[len(OPENED) :]
            elif OPENED.startswith(rest):
                self._held = rest
                return ""
            else:
                blanks, self._blanks = self._blanks, ""
                self._begun()
                return blanks + rest

    def _begun(self) -> None:
        """Leave the beginning: whether there is a thought is known."""
        if self._beginning:
            self._beginning, self._trim = False, self.has_thought
            self.field = self.field or "content"

    def _think(self, text: str) -> tuple[str, str]:
        """The thought in `text`, and the content behind it."""
        if self._beginning:
            return "", ""
        thought, closed, content = text.partition(CLOSED)
        if not closed:
            held = next(n for n in range(len(CLOSED) - 1, -1, -1) if text.endswith(CLOSED[:n]))
            thought, self._held = text[: len(text) - held], text[len(text) - held :]
            return self._shown(thought), ""
        shown = self._shown(thought)
        self.field, self._trim, self._newlines = "content", True, 0
        return shown, content

    def _shown(self, thought: str) -> str:
        """Leave out newlines at both ends: those at the end wait for what follows."""
        thought = self._trimmed(thought)
        body = thought.rstrip("\n")
        newlines, self._newlines = self._newlines, len(thought) - len(body)
        if not body:
            self._newlines += newlines
            return ""
        return "\n" * newlines + body

    def _trimmed(self, text: str) -> str:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text


def begins_in_thought(prompt: str) -> bool:
    """Whether the prompt ends with <think>, and at most white space after it."""
    return prompt.rstrip().endswith(OPENED)


def ends_thought(prompt: str) -> bool:
    """Whether the prompt ends with </think>, and at most white space after it: content is next."""
    return prompt.rstrip().endswith(CLOSED)


def close_thought(prompt: str) -> str:
    """Close what the prompt opens, as an answer without a thought does: content comes next."""
    if not begins_in_thought(prompt):
        return prompt
    return f"{prompt.rstrip()}\n\n{CLOSED}\n\n"


def split_thought(prompt: str, text: str) -> tuple[str | None, str | None]:
    """Split a whole answer, as `ReasoningParser` does in pieces.

    Returns:
        The thought, None where there is none; the content, None where the thought does not end.

    >>> split_thought("Why?<think>\\n", "It is so.\\n</think>\\n\\nBecause.")
    ('It is so.', 'Because.')
    >>> split_thought("Why?", "Because."), split_thought("Why?", "<think>\\nIt is")
    ((None, 'Because.'), ('It is', None))
    """
    parser = ReasoningParser(begins_in_thought(prompt))
    found = {"reasoning_content": "", "content": ""}
    for field, part in (*parser.push(text), *parser.finish()):
        found[field] += part
    thought = found["reasoning_content"] if parser.has_thought else None
    return thought, None if parser.field == "reasoning_content" else found["content"]


def think_tags(prompt: str, text: str) -> list[str]:
    """Every tag of the answer in order, with the one that the prompt ends with.

    A well-formed answer has `[OPENED, CLOSED]`, or none.
    """
    opened = [OPENED] if begins_in_thought(prompt) else []
    return [*opened, *_TAG.findall(text)]


class Speech:
    """A choice's text, token by token, in the field that it belongs to: all in `text`."""

    reasoning_tokens = 0

    def __init__(self, stream: TextStream):
        self._stream = stream

    @property
    def field(self) -> Field | None:
        """That of the next token; None while it is not known yet."""
        return "text"

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stream.stopped_by is not None

    @property
    def characters(self) -> int:
        """Decoded so far, held back or not."""
        return self._stream.characters

    def echo(self, token: int) -> str:
        """Add a token of the prompt; returns the text that it makes certain."""
        return self._stream.echo(token)

    def push(self, token: int, watch: bool = True) -> list[Piece]:
        """Add a token; returns what is certain now. Without `watch` no stop string is found."""
        return [("text", self._stream.push(token, watch))]

    def finish(self) -> list[Piece]:
        """Return what was held back."""
        return [("text", self._stream.finish())]


class ThoughtfulSpeech(Speech):
    """A choice's text as `reasoning_content` and `content`.

    Stop strings are looked for in the content as it is shown: not in the thought, which restates
    questions and examples, not across a tag, and not in the newlines between thought and content.

    Args:
        stream: decodes, and has no stop strings of its own.
        stops: those of the content.
        opened: the prompt has opened the thought.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str], opened: bool):
        super().__init__(stream)
        self._parser = ReasoningParser(opened)
        self._matcher = StopMatcher(stops)

    @property
    def field(self) -> Field | None:
        """That of the next token; None while it is not known yet."""
        return self._parser.field

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._matcher.found is not None

    def push(self, token: int, watch: bool = True) -> list[Piece]:
        """Add a token; returns what is certain now, thought before content."""
        before = self.field
        pieces = self._matched(self._parser.push(self._stream.push(token)), watch)
        self.reasoning_tokens += before == self.field == "reasoning_content"
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back; nothing after a stop string."""
        rest = [*self._parser.push(self._stream.finish()), *self._parser.finish()]
        pieces = self._matched(rest, watch=True)
        return pieces if self.stopped else [*pieces, ("content", self._matcher.release())]

    def _matched(self, pieces: Sequence[Piece], watch: bool) -> list[Piece]:
        found: list[Piece] = []
        for field, text in pieces:
            if field == "content" and self.stopped:
                break
            if field == "content":
                text = self._matcher.push(text) if watch else self._matcher.release() + text
            found.append((field, text))
        return found
