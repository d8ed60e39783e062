"""What is wrong with a model is said in one line, with exit code 2, soon and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from malformed import Kind, write_sound
from malformed_beside import BESIDE
from malformed_gguf import GGUFS, write_gguf
from malformed_weights import WEIGHTS
from malformed_written import WRITTEN, write_ours

KINDS = WEIGHTS + BESIDE + WRITTEN + GGUFS

MEMORY = 1 << 30
SECONDS = 10

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parents[1])}

Command = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_sound(folder)
    write_ours(folder)
    write_gguf(folder)
    return folder


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    """Runs one in a process of its own; see `refused.py`."""
    program = subprocess.Popen(
        [sys.executable, HERE / "refused.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    )
    assert program.stdin and program.stdout
    stdin, stdout = program.stdin, program.stdout

    def run(arguments: list[str]) -> dict[str, Any]:
        print(json.dumps(arguments), file=stdin, flush=True)
        return json.loads(stdout.readline())

    with program:
        yield run
        stdin.close()


def assert_refused(code: int, err: str, says: str) -> None:
    """One line that says it, of no great length, and nothing that a terminal would obey."""
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n")
    assert err[:-1].isprintable() and len(err) < 2500
    assert says in err


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_refused(kind: Kind, sound: Path, tmp_path: Path, command: Command) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(sound / kind.model, source)
    kind.spoil(source)
    before = sorted(tmp_path.rglob("*"))
    for arguments in kind.commands:
        ended = command([part.format(source=source, out=out) for part in arguments])
        assert_refused(ended["code"], ended["err"], kind.says)
        assert ended["peak"] < MEMORY
        assert ended["seconds"] < SECONDS
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_what_is_sound_is_not(sound: Path, tmp_path: Path, command: Command) -> None:
    """The control: only the damage makes those fail."""
    assert len({str(kind) for kind in KINDS}) == len(KINDS)
    for model, arguments in {(kind.model, line) for kind in KINDS for line in kind.commands}:
        out = tmp_path / model
        ended = command([part.format(source=sound / model, out=out) for part in arguments])
        assert (ended["code"], ended["err"]) == (0, ""), arguments
        shutil.rmtree(out, ignore_errors=True)


def test_a_path_that_cannot_be_looked_at(sound: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "loop").symlink_to("loop")
    source, out = str(sound / "single"), str(tmp_path / "out")
    for path in (str(tmp_path / "loop"), str(tmp_path / ("a" * 300))):
        for line in (["inspect", path], ["convert", path, out], ["convert", source, path]):
            ended = command(line)
            assert_refused(ended["code"], ended["err"], "cannot be looked at")


@pytest.mark.parametrize("name", ["a pickle in disguise", "a shard that is a pipe", "10^9 layers"])
def test_the_command_itself_refuses_it(name: str, sound: Path, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    shutil.copytree(sound / kind.model, tmp_path / "model")
    kind.spoil(tmp_path / "model")
    ended = subprocess.run(
        [sys.executable, "-m", "dsjax", "inspect", tmp_path / "model"],
        capture_output=True,
        env=ENVIRONMENT,
        timeout=SECONDS,
        check=False,
    )
    assert_refused(ended.returncode, ended.stderr.decode(), kind.says)
