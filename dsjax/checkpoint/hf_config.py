"""Reading a released `config.json` as a `ModelConfig`. Imports no jax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.architecture import FAMILIES, ModelConfig
from dsjax.checkpoint.rotary_config import rotary_settings
from dsjax.config_files import parse_model
from dsjax.errors import UserError
from dsjax.small_files import read_json

# What the files of a family leave out because its architecture implies it.
_IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {"scoring_func": "softmax"},
    "kimi_k2": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "llama": {"rope_theta": 10000.0},  # Llama 2's config.json does not have it
    "qwen2": {"attention_bias": True},
    "qwen3": {"head_dim": 128},
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

_NULL_MEANS: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}

# Switches that the released models leave alone, with the only values that are built here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
}


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's `config.json` describes, of one of the families built here.

    Keys that do not change the model are passed over. Rotary settings are understood in every
    spelling of the transformers library, see `rotary_config`.

    Raises:
        UserError: a key is missing, of the wrong type, or asks for what is not built here.
    """
    file = folder / "config.json"
    return parse_config(read_json(file), file)


def parse_config(tree: dict[str, Any], file: Path) -> ModelConfig:
    """The same of what was read already; `file` is for messages."""
    family = tree.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{file}: model_type={family!r}; expected one of {', '.join(FAMILIES)}")
    implied = _IMPLIED[family]
    tree = implied | tree
    tree |= rotary_settings(tree, family, str(file))
    _require(_FIXED | {key: (implied[key],) for key in implied if key in _FIXED}, tree, str(file))
    _refuse_windows(tree, family, file)
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
    if family == "llama":  # Llama 1's config.json does not have it
        tree.setdefault("num_key_value_heads", None)
    if "num_key_value_heads" in tree and tree["num_key_value_heads"] is None:
        tree["num_key_value_heads"] = tree.get("num_attention_heads")
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


def _refuse_windows(tree: dict[str, Any], family: str, file: Path) -> None:
    """Refuse Qwen's layers that attend within a window; no release of these families has any."""
    if family not in ("qwen2", "qwen3"):
        return
    kinds, layers = tree.get("layer_types"), tree.get("num_hidden_layers")
    if kinds is not None:
        windowed = not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    elif tree.get("use_sliding_window") and tree.get("sliding_window") is not None:
        first = tree.get("max_window_layers", 28)
        windowed = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
    else:
        windowed = False
    if windowed:
        raise UserError(
            f"{file}: attention within a sliding window (use_sliding_window, layer_types) is not "
            "supported; only full attention is"
        )


def _require(fixed: dict[str, tuple[Any, ...]], tree: dict[str, Any], source: str) -> None:
    for key, values in fixed.items():
        if tree.get(key, values[0]) not in values:
            raise UserError(f"{source}: {key}={tree[key]!r}; only {values[0]!r} is supported")
