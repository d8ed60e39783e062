"""An evaluation is the same whatever happens to it: kills, another order, more samples later."""

import json
import os
import random
import signal

import pytest

from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError
from dsjax.evaluation.protocol import Key, draw, plan
from dsjax.evaluation.settings import Settings
from dsjax.evaluation.tasks import open_tasks
from dsjax.inference.drawing import seed_of
from dsjax.inference.reader import read_checkpoint
from tests.evaluation.stand_ins import KilledError, ScriptedEngine, evaluate

TASKS = ("letters", "arithmetic-easy")


@pytest.fixture
def run(monkeypatch, checkpoint, tmp_path):
    def run(engine, output="out", *tasks, **settings):
        evaluate(monkeypatch, engine, checkpoint, tmp_path / output, *(tasks or TASKS), **settings)
        return tmp_path / output

    return run


def answers(folder) -> dict:
    first, *lines = (folder / "answers.jsonl").read_text().splitlines()
    assert "settings" in json.loads(first)
    found = [json.loads(line) for line in lines]
    keys = {(r["task"], r["question"], r["sample"]): r for r in found}
    assert len(keys) == len(found), "a sample was drawn twice"
    return keys


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_killed_at_random_it_ends_as_if_it_had_not(run):
    whole = run(ScriptedEngine(), "whole")
    rng = random.Random(0)
    kills = drawn = 0
    for number in range(20):
        while True:
            engine = ScriptedEngine(rows=rng.randrange(1, 6), steps=rng.randrange(1, 40))
            try:
                broken = run(engine, f"broken{number}")
                break
            except KilledError:
                kills += 1
            finally:
                drawn += len(engine.submitted)
        assert answers(broken) == answers(whole)
        assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert kills > 20 and drawn < 20 * 30 + kills * 12  # finished ones are not drawn again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_it_and_it_goes_on(run, capsys, number, code):
    whole = answers(run(ScriptedEngine(), "whole"))
    engine = ScriptedEngine()
    step, steps = engine.step, iter(range(99))

    def signalled():
        if next(steps) == 12:
            os.kill(os.getpid(), number)
        return step()

    engine.step = signalled
    with pytest.raises(SystemExit) as stopped:
        run(engine)
    assert stopped.value.code == code and "the same command goes on" in capsys.readouterr().out
    again = ScriptedEngine()
    assert answers(run(again)) == whole
    assert 0 < len(again.submitted) < len(whole)


def test_a_second_call_draws_nothing(run, monkeypatch):
    run(ScriptedEngine())
    again = ScriptedEngine()
    run(again)
    assert again.submitted == []


def test_a_larger_k_draws_what_is_new(run):
    few = answers(run(ScriptedEngine(), k=2))
    engine = ScriptedEngine()
    many = answers(run(engine, k=5))
    assert len(engine.submitted) == len(many) - len(few) == 2 * 5 * 3
    assert few.items() <= many.items()


def test_other_settings_do_not_go_on(run):
    run(ScriptedEngine())
    with pytest.raises(UserError, match=r"temperature=0\.6, now it is 1\.0"):
        run(ScriptedEngine(), temperature=1.0)


def test_seeds_differ_and_depend_on_the_sample_alone():
    keys = [Key(t, q, n) for t in ("a", "b") for q in ("1", "2") for n in range(4)]
    seeds = [seed_of(seed, key) for seed in (0, 1) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(0, Key("letters", "strawberry-r", 0)) == 3476084423


def test_right_answers_score(run, checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    right = {q.prompt: q.example["answer"] for t in open_tasks(TASKS, None) for q in t.questions}

    def script(request):
        """Right in two of three samples, by what the prompt asks."""
        prompt = tokenizer.decode(request.tokens)
        [answer] = [a for question, a in right.items() if question in prompt]
        wrong = request.id.endswith("/1")
        return tokenizer.encode(f"So \\boxed{{{answer}{'1' * wrong}}}")

    scores = results(run(ScriptedEngine(script), max_tokens=100))["tasks"]
    for name in TASKS:
        assert scores[name]["pass@1"]["value"] == pytest.approx(2 / 3)
        assert scores[name]["cons@k"]["value"] == 1
        assert scores[name]["answered"] == 1 and scores[name]["truncated"] == 0


def test_an_answer_that_is_cut_off_says_so(run):
    scores = results(run(ScriptedEngine(lambda request: [50] * 40)))["tasks"]
    assert scores["letters"]["truncated"] == 1 and scores["letters"]["mean_tokens"] == 24


def test_a_limit_beyond_the_context_is_said(run, capsys):
    folder = run(ScriptedEngine(), max_tokens=32_768)
    assert results(folder)["shortened"] == 30
    assert "30 samples had less than 32,768 tokens: the context is 256" in (capsys.readouterr().out)


def test_the_picture_and_the_table_are_there(run, capsys):
    folder = run(ScriptedEngine())
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if "arithmetic" in line] == [
        ["arithmetic-easy", "5", "3"]
    ]


@pytest.mark.slow
def test_a_sample_does_not_depend_on_what_runs_beside_it(checkpoint):
    """The same tokens from the engine itself, one after the other, in fours, in another order."""
    from dsjax.inference.opening import open_engine

    reader, settings = read_checkpoint(checkpoint), Settings(k=2, max_tokens=12)
    samples = plan(open_tasks(["letters"], 4), reader, settings, 256)
    found: list[dict] = []
    for rows, ordered in ((1, samples), (4, samples), (4, samples[::-1])):
        texts: dict = {}
        engine = open_engine(reader, rows, 256)
        for _ in draw(engine, reader, settings, ordered, texts.__setitem__):
            pass
        found.append(texts)
    assert found[0] == found[1] == found[2]
    assert len({record["text"] for record in found[0].values()}) == len(samples)
