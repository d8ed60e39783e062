"""Reading a released `config.json` as a `ModelConfig`. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.checkpoint.safetensors import parse_json
from dsjax.config import ModelConfig, YarnConfig
from dsjax.config_files import parse
from dsjax.errors import UserError, one_line

# What the files of a family leave out because its architecture implies it.
_IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {"scoring_func": "softmax"},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}

# A file may lack these. Everything else must be there: our default for a missing key could be
# another than that of the library which wrote the file, and the model would be another one.
_OPTIONAL = {
    "num_nextn_predict_layers",
    "initializer_range",
    "embedding_initializer_range",  # ours
    "bos_token_id",
    "eos_token_id",
}

_NULL_MEANS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}

# Switches that the released models leave alone, with the only value that is built here.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_FIXED_ROPE: dict[str, Any] = {"attention_factor": None, "truncate": True}


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's `config.json` describes: deepseek_v3, deepseek_v2 or kimi_k2.

    Keys that do not change the model are passed over. Rotary settings are understood in all three
    spellings of the transformers library: `rope_scaling.type`, `rope_scaling.rope_type`, and
    `rope_parameters` with `rope_theta` inside.

    Raises:
        UserError: a key is missing, of the wrong type, or asks for what is not built here.
    """
    file = folder / "config.json"
    try:
        tree = parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {one_line(error)}") from error
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in _IMPLIED:
        raise UserError(f"{file}: model_type={family!r}; expected one of {', '.join(_IMPLIED)}")
    tree = _IMPLIED[family] | tree | _rotary(tree, file)
    _require(_FIXED, tree, str(file))
    for key, meaning in _NULL_MEANS.items():
        if key in tree and tree[key] is None:
            tree[key] = meaning
    if missing := [key for key in ModelConfig.model_fields if key not in tree.keys() | _OPTIONAL]:
        raise UserError(f"{file}: the key {missing[0]!r} is missing")
    known = {key: value for key, value in tree.items() if key in ModelConfig.model_fields}
    return parse(ModelConfig, known, source=str(file))


def _rotary(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as `ModelConfig` has them, from any of the spellings."""
    rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{file}: rotary settings are {rope!r}; expected an object or null")
    theta = rope.get("rope_theta", tree.get("rope_theta"))
    if theta is None:
        raise UserError(f"{file}: the key 'rope_theta' is missing")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise UserError(f"{file}: rotary settings of type {kind!r}; expected yarn or default")
    _require(_FIXED_ROPE, rope, f"{file}: rotary settings")
    yarn = {key: rope[key] for key in YarnConfig.model_fields if key in rope}
    return {"rope_theta": theta, "rope_scaling": yarn}


def _require(fixed: dict[str, Any], tree: dict[str, Any], source: str) -> None:
    for key, value in fixed.items():
        if tree.get(key, value) != value:
            raise UserError(f"{source}: {key}={tree[key]!r}; only {value!r} is supported")
