"""One client's request: engine requests out, updates in, a response or a stream's chunks out."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.data.chat_template import TemplateError
from dsjax.data.text import TextStream, encode_with_added_tokens
from dsjax.data.thinking import Speech, ThoughtfulSpeech, begins_in_thought
from dsjax.data.tokenizer import EncodingError
from dsjax.errors import UserError
from dsjax.inference.request import LARGEST_SEED, Request, Update
from dsjax.serving.bodies import ChatBody, CompletionBody, Message
from dsjax.serving.choice import Choice
from dsjax.serving.forms import ChatForm, CompletionForm, Form
from dsjax.serving.protocol import RequestError, Served
from dsjax.serving.reading import logprobs, read_body, sampling

MAX_CHOICES = 1024
"""Of all prompts of one request together."""

PROMPT_END = 64
"""Tokens at a prompt's end among which a <think> that opens a thought is looked for."""

TEMPLATE_KEYS = ("content", "reasoning_content", "name", "tool_call_id")
"""What a chat template is told of a message, beside its role."""


class Job:
    """What one body asks for, and what has come of it.

    A door submits `requests` to the engine, gives every update to `feed`, cancels in the engine
    what is in `stopped`, and takes `response()` once `done`; or, if `stream`, sends the chunks that
    `feed` returns, and then `usage_chunk()` if `include_usage`.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        form: Form,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        stream: bool,
        include_usage: bool,
    ):
        self.requests = tuple(requests)
        self.stream = stream
        self.include_usage = include_usage
        self.stopped: set[str] = set()
        """Engine requests that a stop string ended: the engine has yet to be told."""
        self._choices = {request.id: c for request, c in zip(requests, choices, strict=True)}
        self._form = form
        self._head = {"id": form.prefix + request_id, "created": int(time.time()), "model": model}

    @property
    def done(self) -> bool:
        """Whether every choice has come to its end."""
        return all(choice.done for choice in self._choices.values())

    def feed(self, update: Update) -> list[dict[str, Any]]:
        """Take what the engine made; returns the chunks that a stream sends for it.

        Updates of a choice that is done are ignored: they were on their way when it ended.
        """
        choice = self._choices[update.request_id]
        if choice.done:
            return []
        part = choice.take(update)
        if choice.stopped and not update.finish:
            self.stopped.add(update.request_id)
        if not self.stream:
            return []
        written = self._form.chunks(choice, part)
        usage = {"usage": None} if self.include_usage else {}
        return [{**self._chunk([choice]), **usage} for choice in written]

    def response(self) -> dict[str, Any]:
        """The whole body, once `done`."""
        choices = [self._form.whole(choice) for choice in self._choices.values()]
        head = {**self._head, "object": self._form.whole_object}
        return {**head, "choices": choices, "usage": self._usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The stream's last chunk, when `include_usage`."""
        return {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._form.chunk_object, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        """Tokens; a prompt counts once, for its first choice."""
        choices = list(self._choices.values())
        firsts = [choice for choice in choices if choice.first]
        prompt = sum(len(choice.prompt) for choice in firsts)
        completion = sum(choice.completion_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in firsts)
        reasoning = sum(choice.speech.reasoning_tokens for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }


def parse(
    endpoint: str,
    body: Any,
    served: Served,
    request_id: str,
    *,
    random_seed: Callable[[], int] = lambda: secrets.randbelow(LARGEST_SEED + 1),
) -> Job:
    """Check a body and make its engine requests, whose ids are `{request_id}-{index}`.

    The choices of a prompt have the seeds seed, seed + 1, ..., the same ones whether the prompt
    comes alone or beside others. Where the client gives no seed, one is drawn for each prompt.

    Raises:
        RequestError: the body cannot be served.
    """
    asked = read_body(endpoint, body, served)
    try:
        prompts = _prompts(asked, served)
    except EncodingError as error:
        name = "messages" if isinstance(asked, ChatBody) else "prompt"
        raise RequestError(400, f"{name}: {error}", name) from None
    n = asked.n or 1
    if n * len(prompts) > MAX_CHOICES:
        message = f"n: {n} for each of {len(prompts)} prompts is more than {MAX_CHOICES} choices"
        raise RequestError(400, message, "n")
    form = ChatForm if isinstance(asked, ChatBody) else CompletionForm
    requests, choices = [], []
    for tokens, added in prompts:
        seed = random_seed() if asked.seed is None else asked.seed
        for place in range(n):
            index = len(requests)
            try:
                settings = sampling(asked, served, len(tokens), seed + place)
            except UserError as error:  # what the engine minds and we did not
                raise RequestError(400, str(error)) from None
            requests.append(Request(f"{request_id}-{index}", tokens, settings))
            choices.append(_choice(asked, served, index, place == 0, tokens, added))
    return Job(
        request_id,
        served.name,
        form(served.tokenizer, logprobs(asked) is not None),
        requests,
        choices,
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
    )


def _prompts(asked: CompletionBody | ChatBody, served: Served) -> list[tuple[tuple[int, ...], int]]:
    """The tokens of every prompt, and how many of them we put in front."""
    if isinstance(asked, ChatBody):
        assert served.template is not None  # read_body has seen to it
        try:
            tokens = served.template.encode(_messages(asked.messages))
        except TemplateError as error:
            raise RequestError(400, f"messages: {error}", "messages") from None
        if not tokens:
            raise RequestError(400, "messages: the chat template writes nothing", "messages")
        return [(tuple(tokens), 0)]
    return [_prompt(prompt, served) for prompt in asked.prompt]


def _prompt(prompt: str | list[int], served: Served) -> tuple[tuple[int, ...], int]:
    """A completion's prompt.

    It is the client's whole prompt, template and all, so a special token that it spells is that
    token, as in vLLM: fill-in-the-middle can be asked for in text. Who completes what strangers
    wrote sends ids, or a chat, whose messages are only text.
    """
    if isinstance(prompt, list):
        return tuple(prompt), 0
    ids = encode_with_added_tokens(served.tokenizer, prompt)
    bos = served.tokenizer.bos_id
    added = [bos] if served.add_bos and bos is not None and ids[:1] != [bos] else []
    if not added + ids:
        raise RequestError(400, "prompt: it is empty, and the model has no bos", "prompt")
    return (*added, *ids), len(added)


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """As templates expect them: they know no developer, and no content that is null."""
    found = []
    for place, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            where = f"messages[{place}].content"
            raise RequestError(400, f"{where} is missing", where)
        texts = {key: getattr(message, key) for key in TEMPLATE_KEYS}
        given = {key: text for key, text in texts.items() if text is not None}
        role = "system" if message.role == "developer" else message.role
        found.append({"content": "", **given, "role": role})
    return found


def _choice(
    asked: CompletionBody | ChatBody,
    served: Served,
    index: int,
    first: bool,
    tokens: tuple[int, ...],
    added: int,
) -> Choice:
    """An empty choice for a prompt's tokens, of which we put the first `added` there."""
    tokenizer, stops = served.tokenizer, asked.stop or ()
    if isinstance(asked, ChatBody):
        tags = {served.think_start_id, served.think_end_id}
        stream = TextStream(tokenizer, hidden=tokenizer.special_ids - tags)
        opened = begins_in_thought(tokenizer.decode(tokens[-PROMPT_END:]))
        speech = ThoughtfulSpeech(stream, stops, opened)
        return Choice(index, tokens, speech, first, asked.min_tokens or 0)
    return Choice(
        index,
        tokens,
        Speech(TextStream(tokenizer, stops, tokenizer.special_ids)),
        first,
        min_tokens=asked.min_tokens or 0,
        silent=asked.max_tokens == 0,
        echo=added if asked.echo else None,
    )
