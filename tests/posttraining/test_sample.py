"""Rejection sampling ends the same whatever happens to it; what cannot be is said at once."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsjax.config_files import load_sample_config
from dsjax.errors import UserError
from dsjax.journal import Journal
from dsjax.posttraining.sample import sample
from dsjax.rewards.score import Scorer
from tests.evaluation.stand_ins import KilledError, ScriptedEngine, babble
from tests.forked import Forks, forks
from tests.posttraining.sampled import checkpoint as checkpoint
from tests.posttraining.sampled import contents, write_config, write_prompts, write_sums
from tests.posttraining.sampled import run as run
from tests.serving.checkpoints import ENVIRONMENT, write_checkpoint


def test_killed_anywhere_it_ends_as_if_it_had_not(run: Callable[..., Path], tmp_path: Path) -> None:
    write_sums(tmp_path, 8)
    whole = contents(run(ScriptedEngine(), "filters=[]", f"output={tmp_path / 'whole'}"))
    rng, kills, drawn = random.Random(0), 0, 0
    for number in range(6):
        output = tmp_path / str(number)
        while not (output / "summary.json").exists():
            engine = ScriptedEngine(rows=rng.randrange(1, 6), steps=rng.randrange(1, 40))
            try:
                run(engine, "filters=[]", f"output={output}")
            except KilledError:
                kills += 1
            drawn += len(engine.submitted)
        assert contents(output) == whole
    assert kills > 10 and drawn < 6 * 24 + kills * 12  # finished ones are not drawn again


def test_a_kill_while_scoring_loses_no_score_and_asks_for_whole_groups_again(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sums(tmp_path, 8)
    monkeypatch.setattr("dsjax.posttraining.sample.AT_ONCE", 6)
    whole = contents(run(ScriptedEngine(), f"output={tmp_path / 'whole'}"))
    write = Journal.write
    monkeypatch.setattr(
        Journal,
        "write",
        lambda self, key, record: (
            write(self, key, record) if key != ("score", 5, 0) else _raise(KilledError)
        ),
    )
    with pytest.raises(KilledError):
        run(ScriptedEngine())
    monkeypatch.setattr(Journal, "write", write)
    sizes = []
    score = Scorer.score

    def counted(self: Scorer, answers: Any) -> Any:
        sizes.append(len(answers))
        return score(self, answers)

    monkeypatch.setattr(Scorer, "score", counted)
    again = ScriptedEngine()
    assert contents(run(again)) == whole and again.submitted == []
    assert sizes == [6, 6]  # of four groups two were done


def _raise(kind: type[Exception]) -> None:
    raise kind


@pytest.mark.slow
def test_killed_three_times_for_real_it_ends_byte_for_byte(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_sums(tmp_path, 16)
    changes = {"sampling": {"k": 4, "max_tokens": 8, "rows": 2}, "filters": [{"name": "distinct"}]}
    config = write_config(tmp_path, checkpoint, **changes)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with forks(tmp_path / "output.txt", ENVIRONMENT) as processes:
        for kill in range(3):
            processes.start("dsjax", "sample", config, f"output={broken}")
            wait_for_lines(processes, broken / "journal.jsonl", 20 * kill)
            processes.kill()
        for output in (broken, whole):
            processes.start("dsjax", "sample", config, f"output={output}")
            assert processes.wait(120) == 0, processes.output.read_text()
        kept = contents(whole)
        assert contents(broken) == kept and kept[0]["answers"] == 64


def wait_for_lines(processes: Forks, file: Path, count: int) -> None:
    for _ in range(20_000):
        if file.exists() and file.read_bytes().count(b"\n") > count:
            return
        assert processes.wait(0.003) is None, processes.output.read_text()
    raise AssertionError("it took more than a minute")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_it_goes_on(
    run: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    write_sums(tmp_path, 8)
    whole = contents(run(ScriptedEngine(), f"output={tmp_path / 'whole'}"))
    engine = ScriptedEngine()
    step, steps = engine.step, iter(range(99))

    def signalled() -> Any:
        if next(steps) == 12:
            os.kill(os.getpid(), number)
        return step()

    engine.step = signalled  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SystemExit) as stopped:
        run(engine)
    assert stopped.value.code == code and "the same command goes on" in capsys.readouterr().out
    again = ScriptedEngine()
    assert contents(run(again)) == whole
    assert 0 < len(again.submitted) < 24


def test_a_finished_run_says_so_and_does_nothing(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(tmp_path, 2)
    folder = run(ScriptedEngine())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "journal.jsonl").write_text("")  # as a kill at the very end leaves it
    capsys.readouterr()
    again = ScriptedEngine()
    run(again, "sampling.rows=7")
    assert again.submitted == [] and "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["sampling.temperature=0.5"], r"sampling\.temperature=1\.0, now it is 0\.5"),
        (["filters=[]"], "filters=.*now it is"),
        (["limit=1"], "limit=None, now it is 1"),
        ([], "questions='.*', now it is"),
    ],
)
def test_other_settings_do_not_go_on(
    run: Callable[..., Path], tmp_path: Path, overrides: list[str], problem: str, finished: bool
) -> None:
    write_sums(tmp_path, 2)
    if finished:
        run(ScriptedEngine())
    else:
        with pytest.raises(KilledError):
            run(ScriptedEngine(steps=3))
    if not overrides:
        write_sums(tmp_path, 3)
    with pytest.raises(UserError, match=problem) as caught:
        run(ScriptedEngine(babble), *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["sampling.k=0"], r"sampling\.k=0: input should be greater than 0"),
        (["keep_per_prompt=0"], "keep_per_prompt=0"),
        (["rewards.0.name=wit"], "unknown reward 'wit'"),
        (["filters=[{name: wit}]"], "unknown filter 'wit'; expected one of finished, correct"),
        (["filters=[{name: finished}, {name: finished}]"], "'finished' stands twice"),
        (["filters=[{name: language, language: xx}]"], "unknown language 'xx'"),
        (["filters=[{name: readable, paragraph: 2}]"], "nearest valid key is 'longest_paragraph'"),
        (["checkpoint=nowhere"], "nowhere: no such folder"),
        (["sampling.max_tokens=256"], r"prompt 1 has \d+ tokens, which with sampling.max_tokens"),
        (["prompts.path=nowhere.jsonl"], "nowhere.jsonl: no file matches"),
        (["mesh.fsdp=3"], "mesh: .* needs 3 devices, but there are"),
        (["output=gs://bucket/x"], "output"),
        ([], r"prompts.jsonl:2: the reward 'exact': the key 'answer' is missing"),
        (["rewards=[{name: format}]"], r"prompts.jsonl:2: .*unknown language 'klingon'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, overrides: list[str], problem: str
) -> None:
    write_prompts(
        tmp_path, {"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "language": "klingon"}
    )
    if overrides and not any("rewards" in each for each in overrides):
        write_sums(tmp_path, 2)
    with pytest.raises(UserError, match=problem) as caught:
        run(ScriptedEngine(), *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", template=None)
    write_prompts(tmp_path, {"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"})
    config = load_sample_config(write_config(tmp_path, plain))
    with pytest.raises(UserError, match=r"prompt 1: .*no chat template") as caught:
        sample(config, Console())
    assert re.search(r"prompts\.jsonl", str(caught.value))
    assert not (tmp_path / "out").exists()


OWN = """
def never(answers):
    return [1 / 0 for _ in answers]

def of_made_up(answers):
    return [{"1": 1.0, "2": 1.0}[one.text.strip()] for one in answers]

def of_most(answers):
    values = [1.0] * len(answers)
    if len(answers) == 6:
        values[3] = None
    return values
"""


def test_a_function_that_fails_is_said_before_or_with_the_first_scores(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sums(tmp_path, 2)
    (tmp_path / "own.py").write_text(OWN)

    def sampled(function: str) -> None:
        own = {"name": "python", "path": str(tmp_path / "own.py"), "function": function}
        output = f"output={tmp_path / function}"
        run(ScriptedEngine(babble), "filters=[]", output, rewards=[own])

    with pytest.raises(UserError, match=r"it fails: ZeroDivisionError in own.py:3"):
        sampled("never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(UserError, match=r"no value for any of the 6 answers of .*own.py:6"):
        sampled("of_made_up")
    sampled("of_most")
    said = capsys.readouterr().out
    assert "1 of 6 answers without a score: python: returned None in own.py:8" in said
