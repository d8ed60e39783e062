"""Conversations to tokens, and which of them the assistant wrote.

Where an answer begins and ends is never searched for in a text. A turn is the prompt that a server
would make of the messages before it, and what the model would have to write then:

    answer     content, or <think>\\n thought \\n</think>\\n\\n content; without the opening tag
               where the template's prompt ends with it, as R1's does. Where the prompt has opened
               a thought and there is none, the answer closes it at once. Where it has ended one,
               as DeepSeek-V3.1's does, and there is a thought, the template's thinking is on.
    end        the template's own, up to its first added token; eos where it has none

A thought is `reasoning_content`, or what a content begins with, up to </think>, by the rules of
`dsjax.data.thinking`. The opening tag may be missing where the prompt ends with it: so servers
without a reasoning parser give R1's answers. An answer that could be split in two ways, or not at
all, is refused: else a thought would be trained as the answer, or its tags as characters.

A turn goes on the one before it, in one example, where its prompt begins with that one's tokens. A
template that leaves earlier thoughts out, as R1's does, makes other prompts: then each turn is an
example.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.conversations import Conversation
from dsjax.data.thinking import (
    CLOSED,
    OPENED,
    begins_in_thought,
    ends_thought,
    split_thought,
)
from dsjax.data.tokenizer import Tokenizer
from dsjax.errors import UserError

_UNQUOTED_END = re.compile("(?<![`'\"])" + CLOSED + "|" + CLOSED + "(?![`'\"])")
"""A </think> that is not a quotation, as the second one here: `</think>`."""


class Example(NamedTuple):
    """Tokens, and which of them are trained: as targets, so a first token never is."""

    tokens: Int32[np.ndarray, " N"]
    trained: Bool[np.ndarray, " N"]


class AnswerEncoder:
    """Examples of conversations, by one checkpoint's template and tokenizer.

    Args:
        train_on: "all" turns of the assistant that are to be trained, or the "last" of them only.

    Raises:
        TemplateError: the template does not end an answer; later, it does not take some messages.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, train_on: str) -> None:
        self._template = template
        self._train_on = train_on
        self._end = _end_of_answer(template, tokenizer)
        self._tokenizer = tokenizer
        self.has_think_tokens = {OPENED, CLOSED} <= set(tokenizer.added_tokens)
        """Whether each tag is one token; else it is trained as text."""
        self.thoughts = 0
        """Answers so far that have one."""

    def examples(self, conversation: Conversation) -> list[Example]:
        """What of a conversation is trained; the same every time.

        Raises:
            UserError: the end of an answer's thought is ambiguous; the message names the line.
        """
        turns = [turn for turn, trained in enumerate(conversation.trained) if trained]
        if self._train_on == "last":
            turns = turns[-1:]
        return list(self._joined(self._turn(conversation, turn) for turn in turns))

    def _turn(self, conversation: Conversation, turn: int) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the answer's."""
        before, message = conversation.messages[:turn], conversation.messages[turn]
        try:
            prompt, text = self._prompt(before, self._template)
            if ends_thought(text) and _thought_and_content(message, opened=True)[0]:
                prompt, text = self._prompt(before, self._thinking_template)
            thought, content = _thought_and_content(message, begins_in_thought(text))
            if thought and ends_thought(text):
                raise ValueError(
                    "has a thought, and the template's prompt has ended it; leave one out"
                )
        except ValueError as error:
            where = f"{conversation.where}: message {turn + 1}, the assistant's"
            raise UserError(f"{where}, {error}") from None
        self.thoughts += bool(thought)
        parts = _answer(thought, content, text)
        return prompt, [*self._template.encode_answer(parts), *self._end]

    @cached_property
    def _thinking_template(self) -> ChatTemplate:
        return self._template.with_thought(True)

    def _prompt(
        self, messages: list[dict[str, str]], template: ChatTemplate
    ) -> tuple[list[int], str]:
        """The prompt's tokens and their text."""
        prompt = template.encode(messages)
        text = self._tokenizer.decode(prompt)
        if self.has_think_tokens and begins_in_thought(text):
            decoded = (self._tokenizer.decode([token]).strip() for token in reversed(prompt))
            if next(filter(None, decoded)) != OPENED:
                raise ValueError(
                    "follows a message that ends with <think>, which is text there and no token; "
                    "choose a chat template whose prompt opens the thought"
                )
        return prompt, text

    def _joined(self, turns: Iterator[tuple[list[int], list[int]]]) -> Iterator[Example]:
        tokens: list[int] = []
        trained: list[bool] = []
        for prompt, answer in turns:
            if prompt[: len(tokens)] != tokens:
                yield _example(tokens, trained)
                tokens, trained = [], []
            trained += [False] * (len(prompt) - len(tokens)) + [True] * len(answer)
            tokens = [*prompt, *answer]
        yield _example(tokens, trained)


def _example(tokens: list[int], trained: list[bool]) -> Example:
    return Example(np.array(tokens, np.int32), np.array(trained, bool))


def _thought_and_content(message: Mapping[str, str], opened: bool) -> tuple[str | None, str]:
    """Split an answer of the data.

    Args:
        message: with `content`, perhaps with `reasoning_content`, whose own tags are dropped.
        opened: the prompt has opened a thought.

    Returns:
        The thought, None where there is none; the content.

    Raises:
        ValueError: there are several ways to split it, or none; one line.
    """
    given, text = message.get("reasoning_content"), message["content"]
    if given is not None:
        given = given.strip().removeprefix(OPENED).removesuffix(CLOSED).strip()
    tagged = text.lstrip().startswith(OPENED)
    thought, content = given, text
    if tagged or _UNQUOTED_END.search(text):
        thought, content = _split(text, tagged or opened)
    if given and thought is not None and thought.strip() != given:
        raise ValueError(
            "has reasoning_content, and another thought in its content; leave one of them out"
        )
    if (thought or "").strip() and not content.strip():
        raise ValueError("has a thought and no content behind it; leave the row out")
    return thought, content


def _split(text: str, opened: bool) -> tuple[str | None, str]:
    """Split a content with think tags, if it is plain where its thought begins and ends."""
    thought, content = split_thought(OPENED, text)
    if content is None:
        raise ValueError("opens a thought that has no </think>; close it, or leave the row out")
    ends_in_quotation = (thought or "").endswith(("`", "'", '"'))
    if OPENED in (thought or "") or _UNQUOTED_END.search(content) or ends_in_quotation:
        raise ValueError(
            "has more think tags than those of one thought at its beginning; give the thought as "
            "reasoning_content"
        )
    if not opened:
        raise ValueError(
            "has </think> without <think>, and the template's prompt opens no thought; begin it "
            "with <think>, or give the thought as reasoning_content"
        )
    return thought, content


def _answer(thought: str | None, content: str, prompt: str) -> list[str]:
    """What the model writes after the prompt: text, a tag, text, a tag, and so on."""
    opened = begins_in_thought(prompt)
    if thought is None and not opened:
        return [content]
    begin = "" if prompt.endswith("\n") and opened else "\n"
    thought, content = (thought or "").strip("\n"), content.lstrip("\n")
    parts = [f"{begin}{thought}\n", CLOSED, f"\n\n{content}"]
    return parts if opened else ["", OPENED, *parts]


def _end_of_answer(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The template's own end up to its first added token; eos where it writes none."""
    end = template.end_of_answer
    added = set(tokenizer.added_tokens.values())
    first = next((place for place, token in enumerate(end) if token in added), None)
    if first is not None:
        return end[: first + 1]
    _, eos = tokenizer.document_ends
    return [eos]
