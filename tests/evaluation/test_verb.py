"""The verb: what a newcomer sees, what is refused in one line, and that it runs."""

import json
import re
import sys

import pytest

from dsjax import cli
from dsjax.inference import opening
from tests.evaluation.stand_ins import ScriptedEngine


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        """Exit code, output and complaint of `dsjax eval ...`."""
        monkeypatch.setattr(sys, "argv", ["dsjax", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


def test_help_names_every_task(call):
    from dsjax.evaluation.tasks import MADE, READ

    code, shown, _ = call("--help")
    assert code == 0
    assert {*MADE, *READ} <= set(re.findall(r"[\w-]+", shown))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--tasks", "leters"], "no such task; did you mean letters?"),
        (["--tasks", "gpqa"], "needs its data, as gpqa=PATH"),
        (["--tasks", "gpqa=none-such.csv"], "none-such.csv: no such file or folder"),
        (["--tasks", "letters", "--k", "0"], "--k is 0; expected at least 1"),
        (["--tasks", "letters", "--no-think"], "--think is a setting of lm-evaluation-harness's"),
        (["--tasks", "letters", "--chat"], "--chat is a setting of lm-evaluation-harness's"),
        (["--tasks", "harness:a", "--k", "2"], "--k is a setting of our own tasks"),
        (["--tasks", "harness:a", "--no-think"], "--think and --no-think are settings of a chat"),
        (["--tasks", "harness:a", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--tasks", "harness:a", "--temperature", "nan"], "--temperature is nan"),
        (["--tasks", "letters", "--k", "x"], "invalid int value: 'x'"),
        (["--tasks", "letters", "--temperature", "0"], "expected --k 1"),
        (["--tasks", "letters", "--temperature", "nan"], "--temperature is nan"),
        (["--tasks", "letters", "--top-p", "0"], "--top-p is 0.0"),
        (["--tasks", "letters", "--rows", "0"], "--rows is 0"),
        (["--tasks", "letters", "--max-tokens", "0"], "--max-tokens is 0"),
        (["--tasks", "letters", "--limit", "0"], "--limit is 0"),
        (["--tasks", "letters", "--context", "20"], "has a prompt of"),
        (["--tasks", "letters", "--context", "9999"], "made for at most 256"),
        (["--tasks", "letters", "--mesh", "x"], "'x' is no mesh"),
        ([], "required: --tasks"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, checkpoint, tmp_path, arguments, problem):
    code, shown, complaint = call(checkpoint, *arguments, "--output", tmp_path / "out")
    assert (code, shown) == (2, "")
    assert complaint.startswith("error: ") and complaint.count("\n") == 1
    assert problem in complaint
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_is_said(call, tmp_path):
    code, _, complaint = call(tmp_path / "none", "--tasks", "letters")
    assert code == 2 and "none: no such folder" in complaint


def test_it_runs(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "open_engine", lambda *_, **__: ScriptedEngine())
    monkeypatch.chdir(tmp_path)
    code, shown, complaint = call(checkpoint, "--tasks", "letters", "--limit", "3", "--k", "2")
    assert code == 0, complaint
    found = json.loads((tmp_path / "evaluations" / checkpoint.name / "results.json").read_text())
    assert found["tasks"]["letters"]["questions"] == 3
    assert found["settings"]["temperature"] == 0.6 and found["settings"]["top_p"] == 0.95
    assert "results.png" in shown
