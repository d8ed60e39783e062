"""How a choice is written: as a completion or as a chat's answer, at once or in chunks.

A chunk and a whole response are written by the same functions, from a part and from all parts
added up, so that what a stream says in pieces is what a response says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsjax.data.thinking import Field
from dsjax.data.tokenizer import Tokenizer
from dsjax.serving.choice import Choice, Part, Score

CHAT_FIELDS: tuple[Field, ...] = ("reasoning_content", "content")


class CompletionForm:
    """Choices of /v1/completions."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, scored: bool):
        self._tokenizer = tokenizer
        self._scored = scored

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of the response."""
        return self._write(choice.index, choice.whole())

    def chunks(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        """Choices of the stream's chunks: none where a part has nothing to tell."""
        told = part.text or part.scores or part.finish
        return [self._write(choice.index, part)] if told else []

    def _write(self, index: int, part: Part) -> dict[str, Any]:
        return {
            "index": index,
            "text": part.text.get("text", ""),
            "logprobs": self._scores(part.scores) if self._scored else None,
            "finish_reason": part.finish,
        }

    def _scores(self, scores: Sequence[Score]) -> dict[str, Any]:
        return {
            "tokens": [spell(self._tokenizer, score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def _top(self, score: Score) -> dict[str, float] | None:
        """The likeliest tokens, and the one that is there, as OpenAI's."""
        if score.logprob is None:
            return None
        top: dict[str, float] = {}
        # Of two tokens that are spelled alike the likelier one, which comes first.
        for token, logprob in (*score.top, (score.token, score.logprob)):
            top.setdefault(spell(self._tokenizer, token), logprob)
        return top


class ChatForm:
    """Choices of /v1/chat/completions."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, scored: bool):
        self._tokenizer = tokenizer
        self._scored = scored

    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice of the response; `reasoning_content` is there if there was a thought."""
        whole = choice.whole()
        message = {"role": "assistant", "content": whole.text.get("content", "")}
        if "reasoning_content" in whole.text:
            message["reasoning_content"] = whole.text["reasoning_content"]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._scores(whole.scores) if self._scored else None,
            "finish_reason": whole.finish,
        }

    def chunks(self, choice: Choice, part: Part) -> list[dict[str, Any]]:
        """Choices of the stream's chunks: the role, text field by field, the reason to end."""
        first = part is choice.parts[0]
        deltas = [self._delta(choice, {"role": "assistant", "content": ""})] if first else []
        for field in CHAT_FIELDS:
            scores = [score for score in part.scores if score.field == field]
            text = {field: part.text[field]} if field in part.text else {}
            if text or scores:
                deltas.append(self._delta(choice, text, scores))
        if part.finish:
            deltas.append({**self._delta(choice, {}), "finish_reason": part.finish})
        return deltas

    def _delta(
        self, choice: Choice, delta: dict[str, str], scores: Sequence[Score] = ()
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._scores(scores) if scores else None,
            "finish_reason": None,
        }

    def _scores(self, scores: Sequence[Score]) -> dict[str, Any]:
        """A list for each field, as DeepSeek's API; a tag is part of the thought."""
        return {
            field: [self._score(score) for score in scores if score.field == field]
            for field in CHAT_FIELDS
        }

    def _score(self, score: Score) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in score.top]
        return {**self._named(score.token, score.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": spell(self._tokenizer, token), "logprob": logprob, "bytes": list(data)}


Form = CompletionForm | ChatForm


def spell(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as text; one that is no whole character as OpenAI writes it, `bytes:\xe2\x82`."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
