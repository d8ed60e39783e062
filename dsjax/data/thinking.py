"""What a model thinks and what it says, told apart by the tokens <think> and </think>.

DeepSeek's API answers with `reasoning_content` beside `content`, and so do we.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from dsjax.data.text import TextStream
from dsjax.data.tokenizer import Tokenizer

OPENED, CLOSED = "<think>", "</think>"

Field = Literal["text", "content", "reasoning_content"]
"""Where text belongs in a response; `text` is a completion's, which is not told apart."""


class Speech:
    """A choice's text, in the field that it belongs to: all in `text`."""

    field: Field = "text"
    reasoning_tokens = 0

    def __init__(self, stream: TextStream):
        self._stream = stream

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stream.stopped_by is not None

    @property
    def characters(self) -> int:
        """Of the present field, held back or not."""
        return self._stream.characters

    def echo(self, token: int) -> tuple[Field, str]:
        """Add a token of the prompt; returns the text that it makes certain."""
        return self.field, self._stream.echo(token)

    def push(self, token: int, watch: bool = True) -> tuple[Field, str]:
        """Add a token; returns its field, and that field's text which is certain now."""
        return self.field, self._stream.push(token, watch)

    def finish(self) -> tuple[Field, str]:
        """What was held back."""
        return self.field, self._stream.finish()


class ThoughtfulSpeech(Speech):
    """A choice's text as `reasoning_content` and `content`.

    Thought begins where the prompt ends with <think> (R1's template does), or where <think> is the
    first token of the output; it ends with </think>. Without an opening tag there is no thought,
    and a tag anywhere else is text as any other. A thought that does not end is all there is.

    Newlines at both ends of a thought, and before the content that follows it, are not shown: the
    model writes "<think>\\n...\\n</think>\\n\\n..." and the API shows the three dots alone. Content
    without a thought is as it is. Stop strings end thought and content alike, but none reaches
    over a tag.
    """

    def __init__(
        self,
        new_stream: Callable[[], TextStream],
        start_id: int | None,
        end_id: int | None,
        thinking: bool,
    ):
        super().__init__(new_stream())
        self.field = "reasoning_content" if thinking else "content"
        self._new_stream = new_stream
        self._start_id, self._end_id = start_id, end_id
        self._opening = not thinking and start_id is not None
        self._trim = thinking
        self._newlines = ""

    def push(self, token: int, watch: bool = True) -> tuple[Field, str]:
        """Add a token; a tag's field is the thought's."""
        opening, self._opening = self._opening, False
        if opening and token == self._start_id:
            self.field = "reasoning_content"
            self._trim = True
            return self.field, ""
        if self.field == "reasoning_content" and token == self._end_id:
            ended = self.finish()
            if not self.stopped:
                self.field = "content"
                self._stream = self._new_stream()
                self._trim = True
                self._newlines = ""
            return ended
        self.reasoning_tokens += self.field == "reasoning_content"
        return self.field, self._shown(self._stream.push(token, watch))

    def finish(self) -> tuple[Field, str]:
        """What was held back, without the newlines that end a thought."""
        return self.field, self._shown(self._stream.finish())

    def _shown(self, text: str) -> str:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if self.field == "content":
            return text
        text = self._newlines + text
        shown = text.rstrip("\n")
        self._newlines = text[len(shown) :]
        return shown


def opens_thought(prompt: Sequence[int], tokenizer: Tokenizer, start_id: int | None) -> bool:
    """Whether the prompt ends with <think>, and at most blanks after it."""
    if start_id is None:
        return False
    for token in reversed(prompt):
        if token == start_id:
            return True
        if tokenizer.token_bytes(token).strip():
            return False
    return False


def begins_in_thought(prompt: str) -> bool:
    """Whether the prompt opened a thought that the model goes on with."""
    return prompt.rstrip().endswith(OPENED)


def split_thought(prompt: str, text: str) -> tuple[str | None, str]:
    """Thought and content of a whole answer whose tags are spelled out; None: it does not think.

    As `ThoughtfulSpeech` tells them apart token by token.

    >>> split_thought("Why?<think>\\n", "It is so.\\n</think>\\n\\nBecause.")
    ('It is so.', 'Because.')
    >>> split_thought("Why?", "Because.")
    (None, 'Because.')
    """
    if not begins_in_thought(prompt):
        if not text.startswith(OPENED):
            return None, text
        text = text.removeprefix(OPENED)
    thought, _, content = text.partition(CLOSED)
    return thought.strip("\n"), content.lstrip("\n")
