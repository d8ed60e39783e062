"""adapter_config.json of PEFT: every setting is supported, without influence, or refused by name.

The table is complete for PEFT 0.21's `LoraConfig`; tests/parity/test_peft_merge.py fails when a
later version has a field that is missing here. A field that no version known here has is refused
unless it is switched off: it may change the weights. No jax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.errors import UserError
from dsjax.small_files import read_json

CONFIG = "adapter_config.json"

SUPPORTED = frozenset(
    {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
     "init_lora_weights", "modules_to_save"}
)  # fmt: skip

NEUTRAL = frozenset(
    {
        # Where the adapter comes from, and how it was trained.
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "runtime_config",
        # Which layers have adapters: the names of the saved tensors say it.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        # Details of a method that another setting switches on.
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
        "megatron_core", "ensure_weight_tying",
    }
)  # fmt: skip
"""Settings that do not change the merged weights."""

REFUSED = {
    "alora_invocation_tokens": "activated LoRA applies after its invocation tokens only, so its "
    "weights cannot be merged",
    "arrow_config": "Arrow chooses among several adapters at every token",
    "bias": "biases of the base model were trained too",
    "fan_in_fan_out": "the weights are transposed",
    "kasa_config": "KaSA truncates the base weights and scales the rank's components",
    "layer_replication": "layers of the base model are repeated",
    "lora_bias": "the adapter adds biases",
    "megatron_config": "the layers are split as Megatron splits them",
    "monteclora_config": "MonteCLoRA samples its weights in every forward pass",
    "target_parameters": "parameters that are not linear layers have adapters, such as routed "
    "experts",
    "trainable_token_indices": "rows of the embedding were trained too",
    "use_bdlora": "the factors are block diagonal",
    "use_qalora": "QA-LoRA pools the inputs of a quantized layer",
    "velora_config": "VeLoRA is not tested here",
}
"""Settings that mean other weights than W + B A scale, with what they do instead."""

_KEEPS_BASE = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica"}
"""Initializations that leave the base weights as they are."""

_CHANGES_BASE = {
    "pissa": "subtracts the initial adapter from the base weights",
    "olora": "subtracts the initial adapter from the base weights",
    "corda": "subtracts the initial adapter from the base weights",
    "lora_ga": "subtracts the initial adapter from the base weights",
    "loftq": "replaces the base weights by quantized ones",
}

_MERGE_THERE = "merge it with PEFT's merge_and_unload and convert the merged model"


class PeftSettings(NamedTuple):
    """What a merge needs to know of adapter_config.json."""

    file: Path
    rank: int | None
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    """By patterns of module names, instead of `rank` and `alpha`."""
    rank_stabilized: bool
    is_dora: bool
    modules_to_save: tuple[str, ...]
    """Ends of the names of modules that were trained whole."""

    def scale(self, module: str, rank: int) -> float:
        """Factor of B A in one module.

        Args:
            module: its released name, `model.layers.0.self_attn.q_proj`.
            rank: of its stored factors.

        Raises:
            UserError: the file gives the module another rank.
        """
        expected = self._find(self.ranks, module, self.rank)
        if expected is not None and expected != rank:
            raise UserError(
                f"{self.file}: the rank of {module} is {expected}, the stored adapter's is {rank}; "
                "the files are of different adapters"
            )
        alpha = self._find(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _find(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, as in PEFT."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise UserError(
                    f"{self.file}: {pattern!r} is not a regular expression: {error}"
                ) from None
        return default


def read_peft_config(folder: Path) -> PeftSettings:
    """Read an adapter's settings.

    Raises:
        UserError: the file is missing or damaged, or a setting means other weights than a merge of
            LoRA's or DoRA's factors into unchanged base weights.
    """
    file = folder / CONFIG
    described = read_json(file)
    if (kind := described.get("peft_type")) != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; expected LORA; {_MERGE_THERE}")
    _check_settings(described, file)
    _check_initialization(described.get("init_lora_weights"), file)
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UserError(f"{file}: r is {rank!r}; expected a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{file}: lora_alpha is {alpha!r}; expected a number")
    return PeftSettings(
        file=file,
        rank=rank,
        alpha=alpha,
        ranks=_patterns(described, "rank_pattern", file),
        alphas=_patterns(described, "alpha_pattern", file),
        rank_stabilized=bool(described.get("use_rslora")),
        is_dora=bool(described.get("use_dora")),
        modules_to_save=_names(described, "modules_to_save", file),
    )


def _check_settings(described: Mapping[str, Any], file: Path) -> None:
    for key, value in described.items():
        if key in SUPPORTED or key in NEUTRAL or not value or value == "none":
            continue
        why = REFUSED.get(key, "this version of dsjax does not know it, and it may change weights")
        raise UserError(f"{file}: {key}={value!r} is not supported: {why}; {_MERGE_THERE}")


def _check_initialization(value: Any, file: Path) -> None:
    method = str(value).lower()
    if method in _KEEPS_BASE:
        return
    known = next((name for name in _CHANGES_BASE if method.startswith(name)), None)
    if known is None:
        raise UserError(
            f"{file}: init_lora_weights={value!r} is not known; expected true, false, gaussian, "
            f"orthogonal, eva or mica; {_MERGE_THERE}"
        )
    convert = "" if known == "loftq" else (
        "save it with PEFT's path_initial_model_for_weight_conversion, or "
    )  # fmt: skip
    raise UserError(
        f"{file}: init_lora_weights={value!r} {_CHANGES_BASE[known]}; {convert}{_MERGE_THERE}"
    )


def _patterns(described: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    found = described.get(key) or {}
    if not isinstance(found, dict) or not all(map(_is_number, found.values())):
        raise UserError(f"{file}: {key} is {found!r}; expected numbers by patterns of names")
    return found


def _names(described: Mapping[str, Any], key: str, file: Path) -> tuple[str, ...]:
    found = described.get(key) or []
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise UserError(f"{file}: {key} is {found!r}; expected a list of names")
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
