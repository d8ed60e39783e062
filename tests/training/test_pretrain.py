"""The command `train.py`, run as users run it."""

import json
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dsjax.training.metrics import read_metrics
from tests.training.runs import ENVIRONMENT, ROOT, overrides, train, train_command, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    done = train(corpus, run_dir, evaluation__sample_tokens=8)
    assert done.returncode == 0, done.stderr
    return run_dir, done


def test_a_run_directory_holds_what_the_docs_promise(finished):
    run_dir, done = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "training.png"):
        assert (run_dir / name).stat().st_size > 0, name
    assert (run_dir / "tokenizer/tokenizer.json").is_file()
    assert list((run_dir / "tensorboard").glob("events*"))
    steps = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert steps == ["00000002", "00000004", "00000006"]
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["bits_per_byte"]) == {"model", "gzip -9", "xz -9e"}
    assert "held-out bits per byte" in done.stdout
    assert "a sample" in done.stdout
    assert done.stderr == ""


def test_a_finished_run_is_not_trained_again(finished, corpus):
    run_dir, _ = finished
    before = (run_dir / "metrics.jsonl").read_text()
    again = train(corpus, run_dir)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_the_run_loads_and_generates(finished):
    import dsjax

    run_dir, _ = finished
    model, tokenizer = dsjax.load(run_dir), dsjax.load_tokenizer(run_dir / "tokenizer")
    [made] = dsjax.generate(model, [[0, *tokenizer.encode("def")]], max_new_tokens=5)
    assert 1 <= len(made) <= 5


@pytest.mark.slow
def test_a_dense_family_trains_evaluates_saves_and_generates(corpus, tmp_path):
    import dsjax

    command = [*train_command(corpus, tmp_path / "run"), "model=cpu-tiny-qwen3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "MaxVio" not in done.stdout
    losses = [r["loss"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert (tmp_path / "run/training.png").stat().st_size > 0
    [made] = dsjax.generate(dsjax.load(tmp_path / "run"), [[0, 5, 9]], max_new_tokens=5)
    assert 1 <= len(made) <= 5


def test_sigterm_saves_and_leaves_with_143(corpus, tmp_path):
    command = train_command(corpus, tmp_path / "run", training__tokens=10**7)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    last = max(r["step"] for r in read_metrics(metrics) if "loss" in r)
    assert (tmp_path / f"run/checkpoints/{last:08d}/manifest.json").is_file()


HANGS = """
import os, runpy, sys, threading
from dsjax.data import pipeline, tokenizer
from dsjax.training import signals

signals.GRACE_SECONDS = 0.5
pipeline._AHEAD = 1
encode, hang = tokenizer.Tokenizer.encode, sys.argv.pop(1)

def encode_or_hang(self, text):
    if os.path.exists(hang):
        threading.Event().wait()
    return encode(self, text)

tokenizer.Tokenizer.encode = encode_or_hang
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_sigterm_ends_a_run_whose_data_do_not_come(corpus, tmp_path):
    """It saves what the steps before have made."""
    changes = {"training__tokens": 10**7, "checkpoint__every_steps": 10**6}
    command = train_command(corpus, tmp_path / "run", data__shuffle_window=4, **changes)
    process = subprocess.Popen(
        [command[0], "-c", HANGS, str(tmp_path / "hang"), *command[2:]],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and len(read_metrics(metrics)) > 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    (tmp_path / "hang").touch()
    before = -1
    while (now := metrics.stat().st_size) > before:
        before = now
        time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "stopped while waiting for data" in out
    last = max(r["step"] for r in read_metrics(metrics) if "loss" in r)
    assert (tmp_path / f"run/checkpoints/{last:08d}/manifest.json").is_file()


def test_a_run_that_diverges_stops_with_its_state(corpus, tmp_path):
    done = train(
        corpus, tmp_path / "run", optimizer__learning_rate=1e30, optimizer__warmup_steps=0,
        training__max_bad_steps=2, training__tokens=10**6,
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 steps in a row were not finite" in done.stdout
    records = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert [r["finite"] for r in records][-2:] == [False, False]
    assert (tmp_path / f"run/checkpoints/{records[-1]['step']:08d}/manifest.json").is_file()


BAD = {
    "unknown key": (
        {"training__tokenss": 5},
        "unknown key 'training.tokenss'; the nearest valid key is 'tokens'",
    ),
    "mistyped value": ({"training__loss_chunk": "many"}, "training.loss_chunk='many'"),
    "top-k above experts": (
        {"model__num_experts_per_tok": 9},
        "num_experts_per_tok=9 is more than n_routed_experts=8",
    ),
    "groups that do not divide": (
        {"model__n_group": 3},
        "n_routed_experts=8 is not divisible by n_group=3",
    ),
    "odd rope dim": ({"model__qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd"),
    "missing tokenizer": ({"data__tokenizer": "/no/tokenizer.json"}, "/no/tokenizer.json"),
    "no data": ({"data__sources": [{"kind": "text", "path": "/no/*.txt"}]}, "/no/*.txt"),
    "a mesh larger than the machine": ({"mesh__tensor": 16}, "needs 16 devices"),
    "a batch that does not divide": (
        {"training__microbatch_size": 4},
        "training.microbatch_size=4",
    ),
    "an axis that does not divide": (
        {"mesh__tensor": 8, "mesh__fsdp": 1},
        "heads=4 is not divisible",
    ),
    "an unknown rule": ({"rules": {"hats": ["fsdp"]}}, "unknown logical axis 'hats'"),
    "a batch ramp off the grid": (
        {"training__batch_size": 12},
        "batch_size=12 is not a multiple",
    ),
}


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Run the command in this process; it must refuse in one line, which is returned."""

    def refused(corpus, run_dir, **changes):
        arguments = ["train.py", "cpu-tiny", *overrides(corpus, run_dir, **changes)]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        assert left.value.code == 2
        [line] = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        return line

    return refused


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(
    kind, corpus, tmp_path, refusal
):
    changes, expected = BAD[kind]
    assert expected in refusal(corpus, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_utf8_is_named(tmp_path, refusal):
    folder = write_corpus(tmp_path / "corpus", 5)
    (folder / "bad.txt").write_bytes(b"caf\xe9 au lait")
    assert "bad.txt" in refusal(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_named(corpus, tmp_path, refusal):
    (tmp_path / "file").write_text("in the way")
    assert "file/run" in refusal(corpus, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__hidden_size": 32}, "another model"),
        ({"model__routed_scaling_factor": 1.5}, "routed_scaling_factor was 2.5, is 1.5"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(finished, corpus, refusal, changes, expected):
    before = sorted(finished[0].rglob("*"))
    assert expected in refusal(corpus, finished[0], **changes)
    assert sorted(finished[0].rglob("*")) == before


def test_a_checkpoint_of_other_data_is_refused(finished, tmp_path, refusal):
    other = write_corpus(tmp_path / "other", 41)
    assert "other data" in refusal(other, finished[0])


def test_a_damaged_newest_step_falls_back_and_says_so(corpus, tmp_path):
    run_dir = tmp_path / "run"
    assert train(corpus, run_dir).returncode == 0
    whole = (run_dir / "checkpoints/00000006/extra.json").read_bytes()
    (run_dir / "checkpoints/00000006/extra.json").write_bytes(whole[:-1] + b"?")
    again = train(corpus, run_dir)
    assert again.returncode == 0, again.stderr
    assert "step 6 is damaged" in again.stderr and "falling back to step 4" in again.stderr
    assert "resuming" in again.stdout and "at step 4" in again.stdout
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_help_explains_and_the_docs_exit_codes_stand_in_it():
    command = train_command(Path("."), Path("."))[:2]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "143" in done.stdout
    done = subprocess.run([*command, "no-such-config"], capture_output=True, text=True)
    assert done.returncode == 2 and "known: cpu-demo" in done.stderr


def test_settings_without_a_config_change_the_default(tmp_path):
    settings = overrides(tmp_path / "none", tmp_path / "run")
    command = train_command(Path("."), Path("."))[:2]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "none" in done.stderr
