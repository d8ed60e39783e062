"""Reading a released `config.json` as a `ModelConfig`. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.architecture import FAMILIES, Llama3Config, ModelConfig, Section, YarnConfig
from dsjax.config_files import parse_model
from dsjax.errors import UserError
from dsjax.small_files import read_json

# What the files of a family leave out because its architecture implies it.
_IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {"scoring_func": "softmax"},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {},
}

# A file may lack these. Everything else must be there: our default for a missing key could be
# another than that of the library which wrote the file, and the model would be another one.
_OPTIONAL = {
    "num_nextn_predict_layers",
    "initializer_range",
    "embedding_initializer_range",  # ours
    "tie_word_embeddings",  # transformers writes it only where it is true
    "bos_token_id",
    "eos_token_id",
}

_NULL_MEANS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}

# Switches that the released models leave alone, with the only value that is built here.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "use_sliding_window": False,
}
_FIXED_ROPE: dict[str, Any] = {"attention_factor": None, "truncate": True}
_EXTENSIONS: dict[str, type[Section]] = {"yarn": YarnConfig, "llama3": Llama3Config}


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's `config.json` describes, of one of the families built here.

    Keys that do not change the model are passed over. Rotary settings are understood in all three
    spellings of the transformers library: `rope_scaling.type`, `rope_scaling.rope_type`, and
    `rope_parameters` with `rope_theta` inside.

    Raises:
        UserError: a key is missing, of the wrong type, or asks for what is not built here.
    """
    file = folder / "config.json"
    tree = read_json(file)
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{file}: model_type={family!r}; expected one of {', '.join(FAMILIES)}")
    implied = _IMPLIED[family]
    tree = implied | tree | _rotary(tree, file)
    _require(_FIXED | {key: implied[key] for key in implied if key in _FIXED}, tree, str(file))
    config = parse_model(_known(tree, family, file), source=str(file))
    if tree.get("tie_word_embeddings", False) != config.tie_word_embeddings:
        raise UserError(f"{file}: tie_word_embeddings=True is not supported for {family}")
    return config


def _known(tree: dict[str, Any], family: str, file: Path) -> dict[str, Any]:
    """The keys that make the model, each with a value."""
    fields = FAMILIES[family].model_fields
    for key, meaning in _NULL_MEANS.items():
        if key in tree and tree[key] is None:
            tree[key] = meaning
    if "head_dim" in fields and tree.get("head_dim") is None:
        tree["head_dim"] = _head_dim(tree, file)
    if missing := [key for key in fields if key not in tree.keys() | _OPTIONAL]:
        raise UserError(f"{file}: the key {missing[0]!r} is missing")
    return {key: value for key, value in tree.items() if key in fields}


def _head_dim(tree: dict[str, Any], file: Path) -> int:
    """Where the file leaves it out, heads share the hidden size."""
    hidden, heads = tree.get("hidden_size"), tree.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
        raise UserError(
            f"{file}: the key 'head_dim' is missing, and hidden_size={hidden!r} does not divide by "
            f"num_attention_heads={heads!r}"
        )
    return hidden // heads


def _rotary(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as ours have them, from any of the spellings."""
    rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{file}: rotary settings are {rope!r}; expected an object or null")
    theta = rope.get("rope_theta", tree.get("rope_theta"))
    if theta is None:
        raise UserError(f"{file}: the key 'rope_theta' is missing")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in _EXTENSIONS:
        raise UserError(
            f"{file}: rotary settings of type {kind!r}; expected default, {', '.join(_EXTENSIONS)}"
        )
    _require(_FIXED_ROPE, rope, f"{file}: rotary settings")
    scaling = {key: rope[key] for key in _EXTENSIONS[kind].model_fields if key in rope}
    return {"rope_theta": theta, "rope_scaling": scaling}


def _require(fixed: dict[str, Any], tree: dict[str, Any], source: str) -> None:
    for key, value in fixed.items():
        if tree.get(key, value) != value:
            raise UserError(f"{source}: {key}={tree[key]!r}; only {value!r} is supported")
