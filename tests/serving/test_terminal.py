"""Chat: what is remembered, what is shown, and what the keys do."""

import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from dsjax.serving import terminal
from dsjax.serving.opening import open_model
from dsjax.serving.options import ModelOptions
from dsjax.serving.terminal import Continuation, Conversation, Screen, answer, run_chat
from tests.serving.checkpoints import ENVIRONMENT, NAME, command, write_checkpoint

CHAT = "/v1/chat/completions"


def write_greedy(folder: Path, **arguments) -> Path:
    write_checkpoint(folder, **arguments)
    defaults = {"temperature": 0, "max_new_tokens": 24}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_greedy(tmp_path_factory.mktemp("model") / NAME)


@pytest.fixture(scope="module")
def opened(folder):
    return open_model(ModelOptions(folder, NAME, rows=1))


@pytest.fixture(scope="module")
def opened_base(tmp_path_factory):
    folder = write_greedy(tmp_path_factory.mktemp("base") / NAME, template=None)
    return open_model(ModelOptions(folder, NAME, rows=1))


def ask(opened, *texts: str) -> str:
    """The answer to the last of these, each an own turn of one conversation."""
    talk, found = Conversation(opened[1]), ""
    for text in texts:
        said: list[str] = []
        answer(*opened, *talk.ask(text), lambda field, piece, said=said: said.append(piece))
        found = "".join(said)
        talk.heard(text, found)
    return found


def pipe(opened, monkeypatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    run_chat(*opened)


def test_from_a_pipe_each_line_is_answered_and_remembered(opened, monkeypatch, capsys):
    pipe(opened, monkeypatch, "one\n\ntwo\n/clear\none\n")
    first, second = ask(opened, "one"), ask(opened, "one", "two")
    assert first != second
    assert capsys.readouterr().out == f"{first}\n{second}\n{first}\n"


def test_the_temperature_is_that_of_the_command_line(opened, monkeypatch, capsys):
    greedy = ask(opened, "one")
    defaults = {**opened[1].defaults, "temperature": 5.0}
    free = dataclasses.replace(opened[1], defaults=defaults)
    for temperature, same in ((None, False), (0.0, True)):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
        run_chat(opened[0], free, temperature)
        assert (capsys.readouterr().out == f"{greedy}\n") == same


def test_a_system_message_stands_before_all_else(opened, monkeypatch, capsys):
    pipe(opened, monkeypatch, "/system be brief\none\n/system\n/clear\none\n")
    briefly, plainly = capsys.readouterr().out[:-1].split("\n" + ask(opened, "one"), 1)[0], ""
    talk = Conversation(opened[1])
    talk.system = "be brief"
    said: list[str] = []
    endpoint, body = talk.ask("one")
    assert endpoint == CHAT and body["messages"][0] == {"role": "system", "content": "be brief"}
    answer(*opened, endpoint, body, lambda field, piece: said.append(piece))
    assert briefly == "".join(said) != ask(opened, "one") and not plainly


def test_a_model_without_a_template_goes_on_with_the_text(opened_base, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "AT_ONCE", 9)
    pipe(opened_base, monkeypatch, "def f\n/system be brief\n")
    captured = capsys.readouterr()
    assert "no chat template" in captured.err and "needs a chat template" in captured.err
    talk, pieces = Continuation(opened_base[1]), []
    endpoint, body = talk.ask("def f")
    assert endpoint == "/v1/completions" and body["max_tokens"] == 9
    answer(*opened_base, endpoint, body, lambda field, piece: pieces.append(piece))
    made = "".join(pieces)
    assert captured.out == made + "\n"
    talk.heard("def f", made)
    assert talk.ask("")[1]["prompt"] == "def f" + made
    talk.clear()
    assert talk.ask("new")[1]["prompt"] == "new"


def test_what_cannot_be_answered_is_said_and_forgotten(opened, monkeypatch, capsys):
    pipe(opened, monkeypatch, f"one\n{'x' * 2000}\ntwo\n/nothing\n/help\n/etc/hosts\n")
    out, err = capsys.readouterr()
    assert out.startswith(f"{ask(opened, 'one')}\n{ask(opened, 'one', 'two')}\n")
    assert "/clear begins anew" in err and "there is no /nothing" in err and "/system TEXT" in err
    assert out == "".join(
        ask(opened, *texts) + "\n"
        for texts in (["one"], ["one", "two"], ["one", "two", "/etc/hosts"])
    )


def test_who_reads_from_the_pipe_may_leave(opened, monkeypatch):
    """`serve.py chat ... | head -1`: no traceback, not even when Python flushes at its end."""
    reading, writing = os.pipe()
    with open(writing, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
        os.close(reading)
        out.write("what was not written yet")
        run_chat(*opened)
    opened[0].cancel("chat-0")  # the process would have ended with it
    assert opened[0].idle


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_answer_and_the_engine_goes_on(opened, number):
    whole, said = ask(opened, "one"), []

    def interrupt(field: str, piece: str) -> None:
        said.append(piece)
        if len(said) == 2:
            os.kill(os.getpid(), number)

    talk = Conversation(opened[1])
    assert answer(*opened, *talk.ask("one"), interrupt) == number
    assert opened[0].idle and whole.startswith("".join(said)) and len("".join(said)) < len(whole)
    assert signal.getsignal(number) not in (signal.SIG_IGN, interrupt)
    assert ask(opened, "one") == whole


def test_thoughts_are_dim_and_no_answer_commands_the_terminal(monkeypatch):
    shown = io.StringIO()
    console = partial(Console, file=shown, force_terminal=True, color_system="standard")
    monkeypatch.setattr(terminal, "Console", console)
    screen = Screen()
    screen.show("reasoning_content", "hm")
    screen.show("reasoning_content", " so")
    screen.show("content", "a\tb\n[red]\x1b]0;title\x07\x9b2J\r")
    screen.end()
    text = shown.getvalue()
    assert text.startswith("\x1b[2mhm\x1b[0m\x1b[2m so\x1b[0m\n\n")
    answered = text.split("\n\n", 1)[1]
    assert "[red]" in answered and not {"\x1b", "\x07", "\x9b", "\r"} & set(answered)


def read_until(screen: int, wanted: str, seconds: float = 60) -> str:
    """What the terminal shows, up to and with `wanted`."""
    text, deadline = "", time.monotonic() + seconds
    os.set_blocking(screen, False)
    while wanted not in text:
        assert time.monotonic() < deadline, text
        try:
            text += os.read(screen, 4096).decode(errors="replace")
        except BlockingIOError:
            time.sleep(0.01)
    return text


def test_at_a_terminal_one_types_pastes_and_leaves(folder, opened):
    screen, keyboard = pty.openpty()
    process = subprocess.Popen(
        command("chat", folder), stdin=keyboard, stdout=keyboard, stderr=keyboard,
        env=ENVIRONMENT | {"TERM": "dumb"}, close_fds=True,
    )  # fmt: skip
    os.close(keyboard)
    try:
        read_until(screen, "> ")
        os.write(screen, b"one\n")
        answered = read_until(screen, "\r\n> ")
        assert plain(ask(opened, "one")) in plain(answered)
        os.write(screen, b"thrown away")
        read_until(screen, "thrown away")
        process.send_signal(signal.SIGINT)
        read_until(screen, "Ctrl-D leaves\r\n> ")
        os.write(screen, b"/clear\n")
        read_until(screen, "\r\n> ")
        os.write(screen, b"one line\nand another\n")
        answered = read_until(screen, "\r\n> ")
        assert plain(ask(opened, "one line\nand another")) in plain(answered)
        os.write(screen, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(screen)


def plain(text: str) -> str:
    """Letters alone: a terminal writes line ends, tabs and colours its own way."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[^a-zA-Z]", "", text)
