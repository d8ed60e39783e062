"""Conversations to tokens, and which of them the assistant wrote.

Where an answer begins and ends is never searched for in a text. A turn is the prompt that a server
would make of the messages before it, and what the model would have to write then:

    answer     content, or <think>\\n thought \\n</think>\\n\\n content; without the opening tag
               where the template's prompt ends with it, as R1's does. A thought is
               `reasoning_content`, or what a content begins with between these tags. Where the
               prompt has opened one and there is none, the answer closes it at once.
    end        the template's own, up to its first added token; eos where it has none

A turn goes on the one before it, in one example, where its prompt begins with that one's tokens. A
template that leaves earlier thoughts out, as R1's does, makes other prompts: then each turn is an
example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsjax.data.chat_template import ChatTemplate
from dsjax.data.conversations import Conversation
from dsjax.data.thinking import CLOSED, OPENED, begins_in_thought
from dsjax.data.tokenizer import Tokenizer


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

    def examples(self, conversation: Conversation) -> list[Example]:
        """What of a conversation is trained; the same every time."""
        turns = [turn for turn, trained in enumerate(conversation.trained) if trained]
        if self._train_on == "last":
            turns = turns[-1:]
        return list(self._joined(self._turn(conversation, turn) for turn in turns))

    def _turn(self, conversation: Conversation, turn: int) -> tuple[list[int], list[int]]:
        """The prompt's tokens, and the answer's."""
        prompt = self._template.encode(conversation.messages[:turn])
        parts = _answer(conversation.messages[turn], self._tokenizer.decode(prompt))
        return prompt, [*self._template.encode_answer(parts), *self._end]

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


def _answer(message: dict[str, str], prompt: str) -> list[str]:
    """What the model writes after the prompt: text, a tag, text, a tag, and so on."""
    thought, content = message.get("reasoning_content"), message["content"]
    if thought is None and content.lstrip().startswith(OPENED) and CLOSED in content:
        thought, _, content = content.lstrip().removeprefix(OPENED).partition(CLOSED)
    opened = begins_in_thought(prompt)
    if thought is None and not opened:
        return [content]
    thought, content = (thought or "").strip("\n"), content.lstrip("\n")
    begin = "" if prompt.endswith("\n") and opened else "\n"
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
