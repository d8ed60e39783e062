"""Keys that are somewhere else, models that are a checkpoint's, paths that are ids of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.source import model_of
from dsjax.config_files import (
    CONFIGS,
    TASKS,
    load_model_config,
    load_run_config,
    refuse_placeholders,
)
from dsjax.config_keys import ALIASES, _all_keys
from dsjax.config_sample import SampleConfig
from dsjax.data.files import find_files
from dsjax.data.language import read_language
from dsjax.data.tokenizer import find_tokenizer
from dsjax.errors import UserError, hub_hint


def refused(call: Any, *arguments: Any) -> str:
    """The one line with which `call` refuses."""
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "override", "meant"),
    [
        ("cpu-tiny", "lr=1", "'optimizer.learning_rate'"),
        ("cpu-tiny", "optimizer.lr=1", "'optimizer.learning_rate'"),
        ("cpu-tiny", "training.learning_rate=1", "'optimizer.learning_rate'"),
        ("cpu-tiny", "warmup=1", "'optimizer.warmup_steps'"),
        ("cpu-tiny", "max_grad_norm=1", "'optimizer.clip_norm'"),
        ("cpu-tiny", "batch_size=1", "'training.batch_size' or 'training.microbatch_size'"),
        ("cpu-tiny", "training.steps=abc", "'training.max_steps'"),
        ("cpu-tiny", "seq_len=1", "'data.sequence_length'"),
        ("cpu-tiny", "bf16=true", "'training.compute_dtype'"),
        ("cpu-tiny", "tp=2", "'mesh.tensor'"),
        ("cpu-tiny", "hidden_size=2", "'model.hidden_size'"),
        ("cpu-tiny", "output_dir=x", "'run_dir'"),
        ("r1/cpu-comparison", "beta=1", "'grpo.kl_weight'"),
        ("r1/cpu-comparison", "grpo.beta=1", "'grpo.kl_weight'"),
        ("r1/cpu-comparison", "kl_coef=1", "'grpo.kl_weight'"),
        ("r1/cpu-comparison", "num_generations=1", "'grpo.group_size'"),
        ("r1/cpu-comparison", "training.num-train-epochs=1", "'training.max_steps'"),
        (
            "r1/cpu-comparison",
            "training.batch_size=1",
            "'grpo.prompts_per_step' or 'training.microbatch_size'",
        ),
        ("r1/cpu-comparison", "model_name_or_path=a/b", "'init'"),
        ("cpu-sft", "lora_r=1", "'lora.rank'"),
        ("cpu-sft", "lora.lora_alpha=1", "'lora.alpha'"),
        ("cpu-sft", "dataset=a", "'data.paths'"),
    ],
)
def test_a_key_of_other_trainers_is_answered_with_ours(
    name: str, override: str, meant: str
) -> None:
    message = refused(load_run_config, name, [override], lambda _: load_model_config("cpu-tiny"))
    key = override.partition("=")[0]
    assert message.endswith(f": unknown key {key!r}; here that is {meant}")


def test_every_alias_leads_to_a_key_of_some_configuration() -> None:
    known = {key for kind in (*TASKS.values(), SampleConfig) for key in _all_keys(kind)}
    assert {key for keys in ALIASES.values() for key in keys} <= known


def test_a_key_like_no_other_lists_those_of_its_section() -> None:
    message = refused(load_run_config, "cpu-tiny", ["evaluation.zzz=1"])
    assert message.endswith(
        "unknown key 'evaluation.zzz'; expected one of every_steps, batches, sample_tokens"
    )


def test_a_key_of_another_task_names_the_task() -> None:
    message = refused(load_run_config, "r1/cpu-comparison", ["lora.rank=4"])
    assert "unknown key 'lora'; 'lora.rank' is of task sft or distill; expected one of" in message


def test_an_unknown_key_is_said_before_a_checkpoint_is_looked_for() -> None:
    message = refused(load_run_config, "cpu-sft", ["init=nowhere", "lr=1"], model_of)
    assert "unknown key 'lr'" in message


@pytest.mark.parametrize("value", ["5", "null", "[a]"])
def test_a_checkpoint_that_is_no_text_is_blamed_rather_than_the_model(value: str) -> None:
    assert ": init=" in refused(load_run_config, "cpu-sft", [f"init={value}"], model_of)


# A model that is the checkpoint's ------------------------------------------------------------


def of_checkpoint(*overrides: str) -> ModelConfig:
    tiny = load_model_config("cpu-tiny")
    return load_run_config("cpu-sft", ["data.sequence_length=64", *overrides], lambda _: tiny).model


def test_a_key_of_the_model_replaces_that_of_the_checkpoint() -> None:
    tiny = load_model_config("cpu-tiny")
    assert of_checkpoint() == of_checkpoint("model=null") == tiny
    changed = of_checkpoint("model.eos_token_id=1", "model.rope_scaling.factor=8")
    assert changed.rope_scaling is not None and tiny.rope_scaling is not None
    assert changed == tiny.model_copy(
        update={
            "eos_token_id": 1,
            "rope_scaling": tiny.rope_scaling.model_copy(update={"factor": 8.0}),
        }
    )
    assert of_checkpoint("model={rope_scaling: null}").rope_scaling is None


def test_an_unknown_or_impossible_key_of_the_model_is_named() -> None:
    assert "unknown key 'model.eos'; " in refused(of_checkpoint, "model.eos=1")
    assert "eos_token_id=-1 is outside" in refused(of_checkpoint, "model.eos_token_id=-1")


# Paths that are names on the hub ---------------------------------------------------------------


def test_an_id_of_the_hub_is_answered_with_its_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "hf download deepseek-ai/DeepSeek-R1 --local-dir DeepSeek-R1"
    name = "deepseek-ai/DeepSeek-R1"
    for call in (load_model_config, load_run_config, model_of, read_language, find_tokenizer):
        assert command in refused(call, name)
    assert command in refused(model_of, f"https://huggingface.co/{name}")
    assert f"data.paths: {name}: no file matches" in refused(find_files, name, "data.paths")
    assert "--repo-type dataset" in refused(find_files, name, "data.paths")
    for other in ("runs/demo", "a/b/c", "/a/b", "one", "a/b.jsonl", "gs://a/b", "../a"):
        assert hub_hint(other) == ""
    (tmp_path / "deepseek-ai").mkdir()
    assert hub_hint(name) == ""


# gs://BUCKET ------------------------------------------------------------------------------------


def test_the_placeholder_of_a_bucket_is_refused_with_all_its_keys() -> None:
    name = "v3-671b-v5p-512"
    with pytest.raises(UserError, match=r"run_dir, data.sources.0.path, data.tokenizer; give run_"):
        refuse_placeholders(load_run_config(name), name)
    given = ["run_dir=runs/a", "data.sources.0.path=a.parquet", "data.tokenizer=gs://bucket/t"]
    config = load_run_config(name, given)
    assert refuse_placeholders(config, name) is config


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_whatever_a_configuration_leaves_open_is_such_a_placeholder(path: Path) -> None:
    """So no run can try to read or write a bucket of that name."""
    for line in path.read_text().splitlines():
        assert ("BUCKET" in line) == ("gs://BUCKET/" in line), line
