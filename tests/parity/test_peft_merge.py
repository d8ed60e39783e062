"""Every method and setting of PEFT's LoRA is merged to the trained model's weights, or refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import config as lora_configs
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

from dsjax.checkpoint.peft import with_adapter
from dsjax.checkpoint.peft_config import CONFIG, NEUTRAL, REFUSED, SUPPORTED
from dsjax.checkpoint.source import open_source
from dsjax.errors import UserError

from .models import CASES, make_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RANK = 4
CLOSE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A dense model and its folder."""
    kind, config = CASES["llama"]
    theirs, folder = make_model(kind, config()), tmp_path_factory.mktemp("base")
    theirs.save_pretrained(folder)
    return theirs, folder


def adapt(base: torch.nn.Module, settings: dict[str, Any]) -> Any:
    """Prepare an adapter as PEFT documents it for its method."""
    targets: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "gate_proj"]}
    config = peft.LoraConfig(r=RANK, lora_alpha=6, task_type="CAUSAL_LM", **targets | settings)
    theirs = copy.deepcopy(base)
    tokens = torch.arange(2 * 64).reshape(2, -1) % 190
    if config.init_lora_weights == "corda":
        preprocess_corda(theirs, config, run_model=lambda: theirs(tokens[:1]))
    if config.init_lora_weights == "lora_ga":
        train_step = lambda: theirs(tokens, labels=tokens).loss.backward()  # noqa: E731
        preprocess_loraga(theirs, config, train_step)
    made = peft.get_peft_model(theirs, config)
    if config.init_lora_weights == "eva":
        data = [{"input_ids": tokens}] * 8
        initialize_lora_eva_weights(made, data, show_progress_bar=False)
    return made


def train(adapted: Any) -> None:
    """Move every adapter away from its initial values."""
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value.add_(torch.randn_like(value) * 0.05)


def saved(base: Any, folder: Path, settings: dict[str, Any], *, converted: bool = False) -> Any:
    """Save a trained adapter in `folder`, and return the trained model."""
    torch.manual_seed(0)
    adapted = adapt(base, settings)
    if converted:
        adapted.save_pretrained(folder / "initial")
    train(adapted)
    more = {"path_initial_model_for_weight_conversion": str(folder / "initial")}
    adapted.save_pretrained(folder, **more if converted else {})
    return adapted


def distance(folder: Path, adapter: Path, trained: Any) -> float:
    """Largest difference between our merge and PEFT's merge of the trained model."""
    wanted = trained.merge_and_unload().state_dict()
    merged = with_adapter(open_source(folder), adapter, None).stored
    moved = max(
        np.abs(merged[name].read() - entry.read()).max()
        for name, entry in open_source(folder).stored.items()
    )
    assert moved > 0.01, "the adapter does nothing"
    return max(float(np.abs(merged[n].read() - wanted[n].numpy()).max()) for n in merged)


MERGED: dict[str, dict[str, Any]] = {
    "kaiming": {},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva"},
    "eva with uneven ranks": {
        "init_lora_weights": "eva",
        "eva_config": peft.EvaConfig(rho=3.0),
    },
    "rank-stabilized": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank-stabilized dora": {"use_dora": True, "use_rslora": True},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded modules": {"exclude_modules": r".*layers\.1\..*"},
    "all linear layers": {"target_modules": "all-linear"},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.gate_proj": 3}},
    "alphas by pattern": {"alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3}},
    "both by pattern, first match first": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers.[01].self_attn.v_proj": 5, "v_proj": 9},
    },
    "dora with patterns": {"use_dora": True, "alpha_pattern": {"q_proj": 1}},
    "dropout": {"lora_dropout": 0.3},
    "head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms and nothing": {"modules_to_save": ["norm", "classifier"], "use_dora": True},
}


@pytest.mark.parametrize("name", MERGED)
def test_the_merge_is_pefts(name: str, base: tuple[Any, Path], tmp_path: Path) -> None:
    theirs, folder = base
    trained = saved(theirs, tmp_path, MERGED[name])
    assert distance(folder, tmp_path, trained) < CLOSE


CHANGES_BASE: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_2": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": lora_configs.CordaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": lora_configs.LoraGAConfig()},
}
"""Initializations that subtract the initial adapter from the base weights."""


@pytest.mark.parametrize("name", CHANGES_BASE)
def test_an_adapter_of_changed_base_weights_is_refused_and_merged_once_converted(
    name: str, base: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    plain, converted = tmp_path / "plain", tmp_path / "converted"
    saved(theirs, plain, CHANGES_BASE[name])
    with pytest.raises(UserError, match=f"init_lora_weights='{name}' subtracts.*conversion, or"):
        with_adapter(open_source(folder), plain, None)
    trained = saved(theirs, converted, CHANGES_BASE[name], converted=True)
    assert json.loads((converted / CONFIG).read_text())["r"] == 2 * RANK
    assert distance(folder, converted, trained) < CLOSE


def test_conversion_with_patterns_is_merged_as_peft_merges_it(
    base: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    settings = {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 3}}  # fmt: skip
    trained = saved(theirs, tmp_path, settings, converted=True)
    assert distance(folder, tmp_path, trained) < CLOSE


CONFIGS: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "bias": {"bias": "lora_only"},
    "kasa_config": {"kasa_config": lora_configs.KasaConfig()},
    "monteclora_config": {"monteclora_config": lora_configs.MontecloraConfig()},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "velora_config": {"velora_config": lora_configs.VeloraConfig(num_groups=4)},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
}


@pytest.mark.parametrize("key", CONFIGS)
def test_an_adapter_with_another_meaning_is_refused_by_the_key(
    key: str, base: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    saved(theirs, tmp_path, CONFIGS[key])
    with pytest.raises(UserError, match=f"{key}=.* is not supported: .*merge_and_unload"):
        with_adapter(open_source(folder), tmp_path, None)


@pytest.mark.parametrize(
    "change",
    [
        *({key: True} for key in sorted(REFUSED.keys() - CONFIGS.keys())),
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "of_next_year"},
        {"of_next_year": {"rank": 3}},
        {"r": 5},
        {"rank_pattern": {"q_proj": 3}},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": [1]},
        {"lora_alpha": None},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": ["lm_head"]},  # which the stored weights lack
    ],
    ids=lambda change: str(min(change)),
)
def test_a_setting_that_cannot_be_followed_is_refused_by_name(
    change: dict[str, Any], base: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    saved(theirs, tmp_path, {})
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    named = "rank of" if change.keys() <= {"r", "rank_pattern"} else min(change)
    with pytest.raises(UserError, match=f"adapter_.*: .*({named}|regular expression)") as found:
        with_adapter(open_source(folder), tmp_path, None)
    assert len(str(found.value).splitlines()) == 1


def test_a_trained_embedding_of_a_tied_model_and_a_pickle_are_refused(tmp_path: Path) -> None:
    kind, config = CASES["llama3"]
    theirs = make_model(kind, config())
    theirs.save_pretrained(tmp_path / "base")
    for module in ("embed_tokens", "lm_head"):
        saved(theirs, tmp_path / module, {"modules_to_save": [module]})
        with pytest.raises(UserError, match=r"embedding and head are one|lm_head\.weight is of no"):
            with_adapter(open_source(tmp_path / "base"), tmp_path / module, None)
    adapt(theirs, {}).save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(UserError, match=r"adapter_model\.bin: a pickle; save the adapter anew"):
        with_adapter(open_source(tmp_path / "base"), tmp_path / "pickle", None)


def test_settings_that_are_switched_off_are_accepted(
    base: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = base
    trained = saved(theirs, tmp_path, {})
    file = tmp_path / CONFIG
    off = {"of_next_year": None, "use_next_year": False, "next_year_pattern": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | off))
    assert distance(folder, tmp_path, trained) < CLOSE


def other_methods() -> list[Callable[[], Any]]:
    """Methods that are not LoRA, by their configurations."""
    targets: dict[str, Any] = {"target_modules": ["q_proj"]}
    names = ("LoHa", "LoKr", "Vera", "OFT", "HRA", "RandLora", "Miss", "VBLoRA", "AdaLora")
    more: dict[str, dict[str, Any]] = {"AdaLora": {"total_step": 9}}
    return [
        partial(peft.IA3Config, feedforward_modules=[], **targets),
        *(partial(getattr(peft, f"{n}Config"), **targets, **more.get(n, {})) for n in names),
    ]


@pytest.mark.parametrize("make", other_methods(), ids=lambda make: make.func.__name__)
def test_another_method_is_refused_by_its_type(
    make: Callable[[], Any], base: tuple[Any, Path], tmp_path: Path
) -> None:
    config = make()
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"peft_type is '{config.peft_type.value}'"):
        with_adapter(open_source(base[1]), tmp_path, None)


def test_every_field_of_pefts_configuration_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == SUPPORTED | NEUTRAL | REFUSED.keys()
    assert not (SUPPORTED & NEUTRAL or (SUPPORTED | NEUTRAL) & REFUSED.keys())
