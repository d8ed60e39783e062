"""Rejection sampling: what is kept, how it is written, and that nothing but settings changes it."""

from __future__ import annotations

import json
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
from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError
from dsjax.inference import opening
from dsjax.inference.request import Request
from dsjax.posttraining.sample import sample
from dsjax.posttraining.sample_filters import KEPT
from tests.evaluation.stand_ins import KilledError, ScriptedEngine, babble
from tests.forked import Forks, forks
from tests.serving.checkpoints import ENVIRONMENT, write_checkpoint

FILES = ("answers.jsonl", "sft.jsonl", "summary.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sampled") / "tiny")


def write_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """A configuration; `changes` replace its sections."""
    tree: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "output": str(folder / "out"),
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "rewards": [{"name": "exact"}],
        "sampling": {"k": 3, "max_tokens": 24, "rows": 4},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree | changes))
    return path


def write_prompts(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> list[Any]:
    """The files of a run, byte for byte but for how fast it was."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["tokens_per_second"]
    return [summary, *((folder / name).read_bytes() for name in FILES[:2])]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """`dsjax sample` over an engine that answers by a script."""

    def run(engine: ScriptedEngine, *overrides: str, **changes: Any) -> Path:
        monkeypatch.setattr(opening, "open_engine", lambda *_, **__: engine)
        path = write_config(tmp_path, checkpoint, **changes)
        config = load_sample_config(path, overrides)
        sample(config, Console())
        return Path(config.output)

    return run


def says(checkpoint: Path, *texts: str) -> Callable[[Request], list[int]]:
    """The texts, the n-th for sample n, each ended by eos."""
    tokenizer = load_tokenizer(checkpoint)
    eos = tokenizer.eos_id
    assert eos is not None
    return lambda request: [*tokenizer.encode(texts[int(request.id.rpartition("/")[2])]), eos]


# What is kept ------------------------------------------------------------------------------------

PARAGRAPH = "so on and on, " * 6
ANSWERS = {
    "Two.</think>4": KEPT,
    "Two.</think>\n\n 4": "duplicate",
    "two.</think>  4": "duplicate",
    "Two!</think>4": KEPT,
    "Two again.</think>4": KEPT,
    "Two.</think>5": "wrong",
    "Two and two" * 30: "truncated",
    "Two and two": "unfinished thought",
    "Two и два, четыре.</think>4": "mixed language",
    "Two.\n```\n2 + 2\n```</think>4": "unreadable: code block in thought",
    f"{PARAGRAPH}</think>4": "unreadable: long paragraph",
    f"{PARAGRAPH[:40]}\n\n{PARAGRAPH[40:]}</think>4": KEPT,
    "\n\n".join(["I add two and two again."] * 9) + "</think>4": "unreadable: repetition",
    "Two.</think>Or not.</think>4": "unreadable: stray tag",
    "Two\x07.</think>4": "unreadable: broken characters",
}


def test_each_answer_is_refused_for_its_own_reason(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "2+2?<think>", "answer": "4"})
    folder = run(
        ScriptedEngine(says(checkpoint, *ANSWERS)),
        "filters.3={name: readable, longest_paragraph: 60}",
        sampling={"k": len(ANSWERS), "max_tokens": 240},
        filters=[{"name": n} for n in ("finished", "correct", "language", "readable", "distinct")],
    )
    written = lines(folder / "answers.jsonl")
    assert {row["text"]: row["verdict"] for row in written if row["finish"] == "stop"} == {
        text: verdict for text, verdict in ANSWERS.items() if verdict != "truncated"
    }
    assert [row["sample"] for row in written] == list(range(len(ANSWERS)))
    summary = json.loads((folder / "summary.json").read_text())
    refused = [verdict for verdict in ANSWERS.values() if verdict != KEPT]
    assert summary["refused"] == {reason: refused.count(reason) for reason in set(refused)}
    assert summary["kept"] == 4 and summary["answers"] == len(ANSWERS)
    assert summary["prompts"] == summary["prompts_solved"] == summary["prompts_kept"] == 1
    kept = [row["text"] for row in written if row["verdict"] == KEPT]
    assert [row["completion"] for row in lines(folder / "sft.jsonl")] == kept


def test_the_same_answer_to_another_prompt_is_no_duplicate_and_to_the_same_prompt_is(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    prompts = ({"prompt": text, "answer": "4"} for text in ("2+2=", "1+3=", "2+2="))
    write_prompts(tmp_path, *prompts)
    engine = ScriptedEngine(says(checkpoint, "4"))
    rows = lines(run(engine, "sampling.k=1") / "sft.jsonl")
    assert [row["provenance"]["prompt"] for row in rows] == [0, 1]


def test_the_language_of_a_line_or_of_the_filter_is_the_one_that_counts(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(
        tmp_path,
        {"prompt": "2+2=", "answer": "x"},
        {"prompt": "1+3=", "answer": "x", "language": "ru"},
    )
    engine = ScriptedEngine(says(checkpoint, "it is four", "это четыре", "3 + 1 = 4"))
    folder = run(engine, filters=[{"name": "language", "language": "en"}])
    verdicts = [row["verdict"] for row in lines(folder / "answers.jsonl")]
    mixed = "mixed language"
    assert verdicts == [KEPT, mixed, KEPT, mixed, KEPT, KEPT]


def test_at_most_so_many_of_a_prompt_are_kept_and_which_ones_is_a_matter_of_the_seed(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, *({"prompt": f"{n}?", "answer": "x"} for n in range(20)))
    texts = [f"answer {letter}" for letter in "abcdef"]
    changes = {"filters": [], "keep_per_prompt": 2, "sampling": {"k": 6, "max_tokens": 24}}
    chosen = []
    for seed in (0, 0, 1):
        engine = ScriptedEngine(says(checkpoint, *texts))
        folder = run(engine, f"output={tmp_path / str(len(chosen))}", f"seed={seed}", **changes)
        rows = [row["provenance"] for row in lines(folder / "sft.jsonl")]
        assert [row["prompt"] for row in rows] == sorted(2 * list(range(20)))
        chosen.append([row["sample"] for row in rows])
        refused = json.loads((folder / "summary.json").read_text())["refused"]
        assert refused == {"over keep_per_prompt": 80}
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0]) == set(range(6))


# How it is written -------------------------------------------------------------------------------


def test_messages_get_the_answer_behind_them_and_its_thought_beside_it(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    said = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2?"},
    ]
    write_prompts(tmp_path, {"prompt": said, "answer": "4"})
    texts = ("<think>\nTwice two.\n</think>\n\n4", "4", "<think></think>\n4")
    rows = lines(
        run(ScriptedEngine(says(checkpoint, *texts)), "sampling.max_tokens=99") / "sft.jsonl"
    )
    earlier = [said[0], said[1] | {"trained": False}, said[2]]
    answer = {"role": "assistant", "content": "4"}
    expected = [answer | {"reasoning_content": "Twice two."}, answer, answer]
    assert [row["messages"] for row in rows] == [[*earlier, each] for each in expected]


def test_texts_are_written_as_they_were_read_and_drawn(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "2+2", "answer": "4"})
    prompts = {"path": str(tmp_path / "prompts.jsonl"), "template": "Q: {prompt}\nA:"}
    texts = (" 4\n", "5", "6")
    folder = run(ScriptedEngine(says(checkpoint, *texts)), prompts=prompts)
    [row] = lines(folder / "sft.jsonl")
    assert (row["prompt"], row["completion"]) == ("Q: 2+2\nA:", " 4\n")


def test_every_row_says_where_it_comes_from(
    run: Callable[..., Path], checkpoint: Path, tmp_path: Path
) -> None:
    write_prompts(tmp_path, {"prompt": "1?", "answer": "no"}, {"prompt": "2?", "answer": "4"})
    engine = ScriptedEngine(says(checkpoint, "4", "4 ", "5"))
    rewards = [{"name": "exact"}, {"name": "length", "limit": 20, "margin": 10, "weight": 0.5}]
    folder = run(engine, "sampling.temperature=0.7", rewards=rewards)
    [row] = lines(folder / "sft.jsonl")
    found = row["provenance"]
    digests = {name: found.pop(name) for name in ("weights", "prompt_digest", "dsjax")}
    assert all(digests.values())
    seeds = {request.id: request.sampling.seed for request in engine.submitted}
    assert len(set(seeds.values())) == 6
    assert found == {
        "checkpoint": str(checkpoint),
        "step": None,
        "manifest": None,
        "prompts": str(tmp_path / "prompts.jsonl"),
        "sampling": {"max_tokens": 24, "temperature": 0.7, "top_p": 1.0, "top_k": 0},
        "prompt": 1,
        "sample": 0,
        "seed": seeds["1/0"],
        "rewards": {"exact": 1.0, "length": 0.0},
    }
    assert lines(folder / "answers.jsonl")[3]["reward"] == 1.0


def test_the_first_answers_of_many_are_those_of_few(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    """So that unfiltered data to compare with needs one answer to each prompt, the same as here."""
    write_prompts(tmp_path, *({"prompt": f"{n}?", "answer": "x"} for n in range(5)))
    many = lines(run(ScriptedEngine(), f"output={tmp_path / 'many'}") / "answers.jsonl")
    one = run(ScriptedEngine(), "sampling.k=1", "filters=[]", f"output={tmp_path / 'one'}")
    firsts = [row["text"] for row in many if row["sample"] == 0]
    assert [row["completion"] for row in lines(one / "sft.jsonl")] == firsts


def test_held_out_prompts_are_left_out_and_a_limit_takes_some_of_the_rest(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = {"path": "last-digit", "held_out_fraction": 0.5}
    found = []
    for seed in (0, 1):
        engine = ScriptedEngine(lambda request: [50])
        overrides = (f"output={tmp_path / str(seed)}", f"seed={seed}", "limit=40", "filters=[]")
        rows = lines(run(engine, *overrides, prompts=prompts) / "sft.jsonl")
        found.append({row["prompt"] for row in rows})
        assert len(found[-1]) == 40
    assert not found[0] & found[1]


# Killed, stopped, done ---------------------------------------------------------------------------


def write_sums(folder: Path, count: int) -> None:
    write_prompts(folder, *({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(count)))


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
    from dsjax.journal import Journal

    write = Journal.write
    monkeypatch.setattr(
        Journal,
        "write",
        lambda self, key, record: (
            write(self, key, record) if key[:2] != ("score", 4) else _raise(KilledError)
        ),
    )
    with pytest.raises(KilledError):
        run(ScriptedEngine())
    monkeypatch.setattr(Journal, "write", write)
    again = ScriptedEngine()
    assert contents(run(again)) == whole and again.submitted == []


def _raise(kind: type[Exception]) -> None:
    raise kind


def test_killed_three_times_for_real_it_ends_byte_for_byte(
    checkpoint: Path, tmp_path: Path
) -> None:
    write_sums(tmp_path, 32)
    changes = {"sampling": {"k": 8, "max_tokens": 16, "rows": 4}, "filters": [{"name": "finished"}]}
    config = write_config(tmp_path, checkpoint, **changes)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with forks(tmp_path / "output.txt", ENVIRONMENT) as processes:
        for kill in range(3):
            processes.start("dsjax", "sample", config, f"output={broken}")
            wait_for_lines(processes, broken / "journal.jsonl", 40 + 60 * kill)
            processes.kill()
        for output in (broken, whole):
            processes.start("dsjax", "sample", config, f"output={output}")
            assert processes.wait(120) == 0, processes.output.read_text()
        kept = contents(whole)
        assert contents(broken) == kept and kept[0]["answers"] == 256


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
