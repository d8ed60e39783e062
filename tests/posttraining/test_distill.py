"""Distillation on logits: against numpy, in any chunks, towards the teacher, and refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint.source import model_of
from dsjax.config_files import load_run_config
from dsjax.config_sft import DistillConfig
from dsjax.data.tokenizer import train_tokenizer
from dsjax.errors import UserError
from dsjax.posttraining.distill import distill
from dsjax.posttraining.divergence import divergence
from dsjax.training.metrics import read_metrics
from tests.forked import forks
from tests.posttraining.chats import overrides, write_base, write_chats
from tests.training.runs import ENVIRONMENT

ROWS, PLACES, WIDTH, THEIR_WIDTH, VOCABULARY = 2, 7, 6, 5, 11


def arrays() -> tuple[np.ndarray, ...]:
    """Hidden states and heads of student and teacher, and weights, some of them zero."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, PLACES, WIDTH), (VOCABULARY, WIDTH), (ROWS, PLACES, THEIR_WIDTH),
              (VOCABULARY, THEIR_WIDTH)]  # fmt: skip
    weights = rng.uniform(size=(ROWS, PLACES)) * (rng.uniform(size=(ROWS, PLACES)) > 0.3)
    return *(rng.normal(size=shape) for shape in shapes), weights


def by_numpy(
    hidden: np.ndarray,
    head: np.ndarray,
    their_hidden: np.ndarray,
    their_head: np.ndarray,
    weights: np.ndarray,
    known: int,
    temperature: float,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, and gradients by hand, of the formula as it is printed; float64."""

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    q = softmax(hidden @ head.T / temperature)
    p = softmax(their_hidden @ their_head[:known].T / temperature)
    value = temperature**2 * (weights * (p * np.log(p / q[..., :known])).sum(-1)).sum()
    p = np.pad(p, ((0, 0), (0, 0), (0, len(head) - known)))
    d_logits = temperature * (q - p) * weights[..., None]
    return value, d_logits @ head, np.einsum("bsv,bsd->vd", d_logits, hidden)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("chunk", "known"), [(3, VOCABULARY), (64, VOCABULARY), (3, 8)])
def test_value_and_gradient_are_those_of_the_formula(
    temperature: float, chunk: int, known: int
) -> None:
    given = arrays()
    value, d_hidden, d_head = by_numpy(*given, known, temperature)
    ours = [jnp.asarray(x, jnp.float32) for x in given]

    def loss(hidden: Any, head: Any) -> Any:
        return 3 * divergence(hidden, head, *ours[2:], known, temperature, chunk)

    found, grads = jax.value_and_grad(loss, argnums=(0, 1))(*ours[:2])
    np.testing.assert_allclose(found, 3 * value, rtol=1e-5)
    np.testing.assert_allclose(grads[0], 3 * d_hidden, atol=1e-5)
    np.testing.assert_allclose(grads[1], 3 * d_head, atol=1e-5)
    np.testing.assert_allclose(divergence(*ours, known, temperature, chunk), value, rtol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    hidden, head, *_, weights = (jnp.asarray(x, jnp.float32) for x in arrays())

    def loss(hidden: Any) -> Any:
        theirs = jax.lax.stop_gradient(hidden), head
        return divergence(hidden, head, *theirs, weights, VOCABULARY, 2.0, 3)

    found, grad = jax.value_and_grad(loss)(hidden)
    assert abs(float(found)) < 1e-6 and float(jnp.abs(grad).max()) < 1e-6


def test_no_array_of_all_places_by_the_vocabulary_is_made() -> None:
    """With chunks of one place, the largest array has no more than a row's places in it."""
    ours = [jnp.asarray(x, jnp.float32) for x in arrays()]
    step = jax.grad(lambda h, *rest: divergence(h, *rest, VOCABULARY, 1.0, 1))
    text = str(jax.make_jaxpr(step)(*ours))
    assert f"{ROWS},1,{VOCABULARY}]" in text
    assert f"{ROWS},{PLACES},{VOCABULARY}]" not in text


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("student") / "base", num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another architecture."""
    folder = tmp_path_factory.mktemp("teacher") / "base"
    return write_base(folder, "cpu-tiny-qwen3", initializer_range=0.2)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


def settings(student: Path, teacher: Path, chats: Path, run_dir: Path, **changes: Any) -> list[str]:
    """A run of `task: distill`."""
    own = {"task": "distill", "teacher": {"checkpoint": str(teacher), "temperature": 2.0},
           "training__batch_size": 8, "training__microbatch_size": 8}  # fmt: skip
    return overrides(student, chats, run_dir, **own | changes)


def run(folder: Path, made: list[str], devices: int = 1) -> list[float]:
    """The losses of a run's steps."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    with forks(folder / "output.txt", ENVIRONMENT | {"XLA_FLAGS": flags}) as processes:
        processes.start("train", "cpu-sft", *made)
        assert processes.wait(300) == 0, processes.output.read_text()
    return [r["loss"] for r in read_metrics(folder / "run/metrics.jsonl") if "loss" in r]


EPOCHS = {"training__epochs": 12, "evaluation__every_steps": 100}


@pytest.fixture(scope="module")
def alone(
    student: Path, teacher: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Losses on one device."""
    folder = tmp_path_factory.mktemp("alone")
    return run(folder, settings(student, teacher, chats, folder / "run", **EPOCHS))


@pytest.mark.slow
def test_a_run_comes_nearer_to_its_teacher(alone: list[float]) -> None:
    assert alone[-1] < 0.9 * alone[0]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "mesh"), [(288, "tensor"), (304, "fsdp")])
def test_a_teacher_padded_otherwise_over_devices_is_the_same(
    size: int, mesh: str, alone: list[float], student: Path, teacher: Path, chats: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The student's vocabulary has 300 places, the tokenizer 261 of them."""
    theirs = shutil.copytree(teacher, tmp_path / "theirs")
    tensors = load_file(theirs / "model.safetensors")
    for name, tensor in tensors.items():
        if len(tensor) == 300:
            tensors[name] = np.pad(tensor, ((0, 4), (0, 0)), constant_values=9)[:size]
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    said = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(said | {"vocab_size": size}))
    changes = EPOCHS | {"training__max_steps": 3, f"mesh__{mesh}": 2}
    losses = run(tmp_path, settings(student, theirs, chats, tmp_path / "run", **changes), devices=2)
    np.testing.assert_allclose(losses, alone[:3], rtol=1e-4)


def test_a_teacher_of_another_vocabulary_is_refused(
    student: Path, teacher: Path, chats: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "tokenizer").mkdir(parents=True)
    (other / "config.json").write_text((teacher / "config.json").read_text())
    (other / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes())
    train_tokenizer(["an other text, an other text"], 264).save(other)
    smaller = write_base(tmp_path / "smaller", vocab_size=260)
    for checkpoint, says in (
        (other, "its tokenizer is not that of"),
        (smaller, "the tokenizer has 261 tokens, the model's vocab_size is 260"),
        (tmp_path / "none", "no such folder"),
    ):
        found = load_run_config(
            "cpu-sft", settings(student, checkpoint, chats, tmp_path / "run"), model_of
        )
        assert isinstance(found, DistillConfig)
        with pytest.raises(UserError, match=says) as caught:
            distill(found, Console(quiet=True))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="teacher' is missing"):
        load_run_config("cpu-sft", ["task=distill", f"init={json.dumps(str(student))}"], model_of)
    assert not (tmp_path / "run").exists()
