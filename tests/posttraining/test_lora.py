"""Low-rank adapters: what is trained, what a checkpoint holds, and what becomes of it elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.checkpoint.convert import convert
from dsjax.checkpoint.manifest import read_manifest
from dsjax.checkpoint.peft import CONFIG, WEIGHTS, read_peft
from dsjax.checkpoint.run_weights import newest_step
from dsjax.checkpoint.safetensors import read_header
from dsjax.checkpoint.source import open_source
from dsjax.config_files import load_run_config
from dsjax.config_sft import SftConfig
from dsjax.errors import UserError
from dsjax.model.layers import Frozen, RouterBias, variables
from dsjax.posttraining.tuned import Tuned
from dsjax.training.run import make_layout
from dsjax.training.step import Batch, Knobs, make_train_step
from sharding.rules import use_layout
from tests.forked import forks
from tests.posttraining.chats import config, newest, overrides, write_base, write_chats
from tests.training.runs import ENVIRONMENT

MODULES = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj",
           "up_proj", "down_proj"]  # fmt: skip
LORA = {"rank": 4, "alpha": 8, "target_modules": MODULES}
TOKENS = np.arange(20, 68, dtype=np.int32).reshape(1, -1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def run_dir(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters that stopped once, and went on from its checkpoint."""
    found = tmp_path_factory.mktemp("runs") / "run"
    with forks(found.parent / "output.txt", ENVIRONMENT) as processes:
        for steps in (3, 6):
            changes = {"lora": LORA, "training__max_steps": steps, "optimizer__learning_rate": 0.02}
            processes.start("train", "cpu-sft", *overrides(base, chats, found, **changes))
            assert processes.wait(300) == 0, processes.output.read_text()
    return found


def logits(model: Any) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t).logits)(model, jnp.asarray(TOKENS)))


def test_adapters_alone_are_trained_and_begin_at_nothing(base: Path, chats: Path) -> None:
    run = config(base, chats, base.parent / "run", lora=LORA, optimizer__weight_decay=0)
    layout = make_layout(run, jax.devices()[:1])
    with use_layout(layout):
        begun = Tuned(run, layout).begin()
        np.testing.assert_array_equal(logits(begun.model), logits(dsjax.load(base)))
        before = {name: np.asarray(value[...]) for name, value in variables(begun.model)}
        frozen = {n for n, v in variables(begun.model) if isinstance(v, Frozen | RouterBias)}
        assert {name for name, _ in variables(begun.moments[1].mu)} == before.keys() - frozen
        tokens = jnp.asarray(TOKENS)[None]
        knobs = Knobs(jnp.float32(0.1), jnp.float32(0), jnp.float32(0))
        step = jax.jit(make_train_step(run))
        after, _ = step(begun, Batch(tokens, jnp.ones_like(tokens)), jnp.int32(1), knobs)
    for name, value in variables(after.model):
        moved = not np.array_equal(before[name], np.asarray(value[...]))
        # The gradient of A is a multiple of B, which is zero: A moves from the second step on.
        assert moved == name.endswith("adapter.b"), name


def test_a_checkpoint_holds_the_adapters_and_not_what_is_frozen(run_dir: Path) -> None:
    step, _ = newest_step(run_dir)
    leaves = read_manifest(step)["leaves"]
    trained = [name for name in leaves if name.startswith("model.") and "adapter" not in name]
    assert [name for name in trained if "router.bias" not in name] == []
    assert sum("adapter" in name for name in leaves if name.startswith("model.")) == 2 * 16
    assert not any("embed" in name for name in leaves)


def test_the_run_loads_merged_and_so_does_what_peft_would_open(
    run_dir: Path, base: Path, tmp_path: Path
) -> None:
    ours = logits(dsjax.load(run_dir))
    assert np.abs(ours - logits(dsjax.load(base))).max() > 1e-2
    convert(base, tmp_path / "merged", to="hf", adapter=run_dir / "adapter", verify=True)
    convert(run_dir, tmp_path / "converted", to="hf")
    for name in ("merged", "converted"):
        np.testing.assert_array_equal(logits(dsjax.load(tmp_path / name)), ours)
    assert (tmp_path / "converted" / "chat_template.jinja").is_file()


def test_weights_in_fp8_are_widened_before_an_adapter_is_added(
    run_dir: Path, base: Path, tmp_path: Path
) -> None:
    adapter = run_dir / "adapter"
    convert(base, tmp_path / "fp8", to="hf", dtype="fp8")
    with pytest.raises(UserError, match=r"stored in FP8.*choose --dtype"):
        convert(tmp_path / "fp8", tmp_path / "merged", to="hf", adapter=adapter)
    convert(tmp_path / "fp8", tmp_path / "merged", to="hf", dtype="bfloat16", adapter=adapter)
    convert(tmp_path / "fp8", tmp_path / "wide", to="hf", dtype="float32")
    found, wide = open_source(tmp_path / "merged").stored, open_source(tmp_path / "wide").stored
    for name, low in read_peft(adapter, open_source(base).config).items():
        want = wide[name].read() + low.b @ low.a * low.scale
        np.testing.assert_allclose(found[name].read().astype(np.float32), want, rtol=2**-8)


def test_the_tuned_model_computes_what_the_merged_one_does(run_dir: Path) -> None:
    run = load_run_config(run_dir / "config.yaml")
    assert isinstance(run, SftConfig)
    tuned = Tuned(run, make_layout(run, jax.devices()[:1]))
    _, restored, _ = newest(run_dir, tuned)
    with use_layout(tuned.layout):
        beside = logits(tuned.complete(restored).model)
    np.testing.assert_allclose(beside, logits(dsjax.load(run_dir)), atol=1e-4)


def test_peft_finds_what_it_looks_for(run_dir: Path) -> None:
    described = json.loads((run_dir / "adapter" / CONFIG).read_text())
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 4, 8)
    assert "self_attn.q_a_proj" in described["target_modules"]
    shapes = {n: e.shape for n, e in read_header(run_dir / "adapter" / WEIGHTS).items()}
    module = "base_model.model.model.layers.1.mlp.shared_experts.down_proj"
    assert shapes[f"{module}.lora_A.weight"][0] == shapes[f"{module}.lora_B.weight"][1] == 4


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"rank": 0, "alpha": 8}, "lora.rank=0"),
        ({"rank": 4}, "lora.alpha' is missing"),
        ({"rank": 4, "alpha": 8, "target_modules": ["wq"]}, "no linear layer 'wq'.*choose of"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_is_read(
    lora: dict[str, Any], says: str, base: Path, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        run = config(base, chats, tmp_path / "run", lora=lora)
        Tuned(run, make_layout(run, jax.devices()[:1]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected LORA"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' subtracts"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing; modules_to_save"),
        ({"of_next_year": True}, "of_next_year=True is not supported"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    described: dict[str, Any], says: str, run_dir: Path, base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    written = json.loads((run_dir / "adapter" / CONFIG).read_text()) | described
    (folder / CONFIG).write_text(json.dumps(written))
    (folder / WEIGHTS).write_bytes((run_dir / "adapter" / WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=says):
        convert(base, tmp_path / "merged", to="hf", adapter=folder)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model_is_refused(run_dir: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", hidden_size=32, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"q_a_proj.weight is .* it is of another model"):
        convert(other, tmp_path / "merged", to="hf", adapter=run_dir / "adapter")
