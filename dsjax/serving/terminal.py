"""`serve.py chat`: a conversation in the terminal, or, from a pipe, an answer for each line."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import EncodingError
from dsjax.serving.job import parse
from dsjax.serving.protocol import RequestError, Served
from dsjax.serving.reading import CHAT, COMPLETIONS
from dsjax.training.signals import catch_termination

if TYPE_CHECKING:
    from dsjax.inference.engine import Engine

HELP = """\
/clear          forget the conversation
/system TEXT    what the model is told before all else; without TEXT nothing
/help           this
Ctrl-C stops an answer, Ctrl-D leaves. Text that is pasted may have several lines."""

NO_TEMPLATE = "this model has no chat template: it continues your text; an empty line lets it go on"

AT_ONCE = 256
"""Tokens that a model without a chat template goes on for."""
PASTE_SECONDS = 0.03
"""Lines that come faster than this were not typed one by one."""

# What a model says may hold a terminal's commands; of these only line ends and tabs are shown.
_CONTROLS = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


class Conversation:
    """Messages, for a model with a chat template."""

    def __init__(self, served: Served):
        self.system = ""
        self._model = served.name
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> tuple[str, dict[str, Any]]:
        """All messages so far, and a new one."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*first, *self._messages, {"role": "user", "content": text}]
        return CHAT, {"model": self._model, "messages": messages, "stream": True}

    def heard(self, text: str, answer: str) -> None:
        """Both messages; what was thought in between is not kept."""
        self._messages.append({"role": "user", "content": text})
        self._messages.append({"role": "assistant", "content": answer})

    def clear(self) -> None:
        """Forget the messages."""
        self._messages = []


class Continuation:
    """One growing text, for a model without a chat template."""

    def __init__(self, served: Served):
        self._served = served
        self._text = ""

    def ask(self, text: str) -> tuple[str, dict[str, Any]]:
        """The text with what was typed at its end, and as much room as there is."""
        prompt = self._text + text
        used = len(encode_with_added_tokens(self._served.tokenizer, prompt)) + 1  # bos
        room = max(1, min(AT_ONCE, self._served.context - used))
        body = {"model": self._served.name, "prompt": prompt, "max_tokens": room, "stream": True}
        return COMPLETIONS, body

    def heard(self, text: str, answer: str) -> None:
        """The text grows."""
        self._text += text + answer

    def clear(self) -> None:
        """Begin a new text."""
        self._text = ""


Talk = Conversation | Continuation


def run_chat(engine: Engine, served: Served, temperature: float | None = None) -> None:
    """Talk until the input ends, or whoever reads the answers has had enough.

    `temperature` None: what the checkpoint says, else 1.

    Raises:
        KeyboardInterrupt: Ctrl-C where nobody sits at a terminal.
        SystemExit: 143, after SIGTERM.
    """
    if temperature is not None:
        defaults = {**served.defaults, "temperature": temperature}
        served = dataclasses.replace(served, defaults=defaults)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with notes.status("compiling"):
        engine.warm_up()
    talk = Conversation(served) if served.template else Continuation(served)
    if not served.template:
        notes.print(NO_TEMPLATE)
    elif interactive:
        notes.print(f"{served.name}: /help says what can be done here", style="dim")
    screen = Screen() if interactive else Pipe()
    try:
        for line in _typed() if interactive else _piped():
            nothing = not line.strip() and isinstance(talk, Conversation)
            if not nothing and not _command(line, talk, notes.print):
                _turn(line, talk, engine, served, screen, notes)
    except BrokenPipeError:
        _hush()


def _turn(
    line: str, talk: Talk, engine: Engine, served: Served, screen: Screen | Pipe, notes: Console
) -> None:
    """One message and its answer."""
    said: list[str] = []

    def say(field: str, text: str) -> None:
        if field != "reasoning_content":
            said.append(text)
        screen.show(field, text)

    try:
        stopped = answer(engine, served, *talk.ask(line), say)
    except RequestError as error:
        hint = "; /clear begins anew" if error.code == "context_length_exceeded" else ""
        notes.print(f"{error.message}{hint}", style="red")
        return
    except EncodingError as error:
        notes.print(str(error), style="red")
        return
    screen.end()
    talk.heard(line, "".join(said))
    if stopped == signal.SIGTERM:
        sys.exit(128 + stopped)
    if stopped:
        if isinstance(screen, Pipe):
            raise KeyboardInterrupt
        notes.print("stopped", style="dim")


def answer(
    engine: Engine,
    served: Served,
    endpoint: str,
    body: dict[str, Any],
    say: Callable[[str, str], None],
) -> int | None:
    """Run one request and give each piece of text to `say`, with the field that it is in.

    Signals are obeyed between two steps: an engine cannot be left in the middle of one. Returns
    the signal that stopped the answer, if any did.

    Raises:
        RequestError: the request cannot be served.
    """
    job = parse(endpoint, body, served, "chat")
    with catch_termination() as asked:
        for request in job.requests:
            engine.submit(request)
        while not job.done and asked.received is None:
            for chunk in (chunk for update in engine.step() for chunk in job.feed(update)):
                for choice in chunk["choices"]:
                    for field, text in choice.get("delta", {"text": choice.get("text")}).items():
                        if field != "role" and text:
                            say(field, text)
        for request in job.requests:
            engine.cancel(request.id)
    return asked.received


def _command(line: str, talk: Talk, note: Callable[[str], None]) -> bool:
    """Obey a line that is a command; False: it is something to say."""
    word, _, rest = line.partition(" ")
    if not (word.startswith("/") and word[1:].isalpha()) or "\n" in word:
        return False
    if word == "/clear":
        talk.clear()
    elif word == "/system" and isinstance(talk, Conversation):
        talk.system = rest.strip()
    elif word == "/system":
        note("a system message needs a chat template, which this model has not")
    elif word == "/help":
        note(HELP)
    else:
        note(f"there is no {word}; /help says what there is")
    return True


# ---------------------------------------------------------------------------------------------
# The terminal, and the pipe
# ---------------------------------------------------------------------------------------------


class Screen:
    """Text on a terminal, thoughts dimmed."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._field = ""

    def show(self, field: str, text: str) -> None:
        """Print a piece; the answer begins a paragraph after the thought."""
        if self._field == "reasoning_content" != field:
            self._console.print("\n")
        self._field = field
        style = "dim" if field == "reasoning_content" else None
        self._console.print(text.translate(_CONTROLS), style=style, end="")

    def end(self) -> None:
        """The answer is over."""
        self._field = ""
        self._console.print()


class Pipe:
    """Answers alone, as they are; who has read enough, such as `head`, breaks it."""

    def show(self, field: str, text: str) -> None:
        """Write a piece of an answer."""
        if field != "reasoning_content":
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        """The answer is over."""
        sys.stdout.write("\n")
        sys.stdout.flush()


def _hush() -> None:
    """Python writes once more when it ends, what is left; nobody is there to read that."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _typed() -> Iterator[str]:
    """What is typed or pasted, until Ctrl-D; Ctrl-C throws a line away."""
    import readline  # noqa: F401  gives input() a history and keys to edit with

    while True:
        try:
            lines = [input("> ")]
            while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
                lines.append(input())
        except KeyboardInterrupt:
            print("\nCtrl-D leaves")
            continue
        except EOFError:
            print()
            return
        yield "\n".join(lines)
