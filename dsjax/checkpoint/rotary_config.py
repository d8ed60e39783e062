"""Rotary settings of a `config.json` in every spelling, read as the family's own code reads them.

The spellings: `rope_scaling` or `rope_parameters`; `rope_type` or `type`; `rope_theta` inside them
or at the top level; null for a default. What they mean is what transformers computes for the family
(`modeling_rope_utils.py`), and for DeepSeek's families what DeepSeek's own code does where the two
disagree. A setting that is not computed here is refused by name. Imports no jax.
"""

from __future__ import annotations

import math
from typing import Any

from dsjax.architecture import (
    FAMILIES,
    DenseConfig,
    LinearConfig,
    Llama3Config,
    Section,
    YarnConfig,
)
from dsjax.errors import UserError

EXTENSIONS: dict[str, type[Section]] = {
    "linear": LinearConfig,
    "yarn": YarnConfig,
    "llama3": Llama3Config,
}

ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


def rotary_settings(tree: dict[str, Any], family: str, source: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as `ModelConfig` has them.

    Args:
        tree: the whole `config.json`.
        family: its `model_type`.
        source: what messages name.

    Raises:
        UserError: the settings are malformed, incomplete, or ask for what is not computed here.
    """
    rope = _given(tree, source)
    theta = rope.get("rope_theta", tree.get("rope_theta"))
    if theta is None:
        raise UserError(f"{source}: the key 'rope_theta' is missing")
    part = rope.get(PARTIAL, tree.get(PARTIAL))
    if part not in (None, 1):
        raise UserError(f"{source}: {PARTIAL}={part!r}; only whole heads are rotated here")
    kind = _kind(rope)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in EXTENSIONS:
        raise UserError(
            f"{source}: rotary settings of type {kind!r}; expected default, {', '.join(EXTENSIONS)}"
        )
    dense = FAMILIES[family] is DenseConfig
    scaling = {key: rope[key] for key in EXTENSIONS[kind].model_fields if key in rope}
    if kind == "linear":
        scaling["rope_type"] = kind
    else:
        scaling |= _original_length(tree, rope, dense)
    if kind == "yarn":
        _complete_yarn(scaling, tree, rope, dense)
    required = (k for k, field in EXTENSIONS[kind].model_fields.items() if field.is_required())
    if missing := [key for key in required if key not in scaling]:
        raise UserError(f"{source}: the key 'rope_scaling.{missing[0]}' is missing")
    if not dense and kind != "yarn" and (m := rope.get("mscale_all_dim")):
        raise UserError(f"{source}: mscale_all_dim={m!r} with type {kind!r}; expected yarn")
    return {"rope_theta": theta, "rope_scaling": scaling}


def rotary_remark(tree: dict[str, Any], source: str) -> str | None:
    """A line about a setting that other libraries read and this one does not, as transformers."""
    rope = _given(tree, source)
    factor, attn = rope.get("factor"), rope.get("attn_factor")
    if not isinstance(attn, int | float) or attn == 1:
        return None
    if _kind(rope) != "yarn" or "attention_factor" in rope:
        return None
    return (
        f"rope_scaling.attn_factor={attn!r} is not used, as in transformers; vLLM multiplies cos "
        f"and sin by it. To do so here, set attention_factor={_times_yarn(factor, attn)}"
    )


def _times_yarn(factor: Any, attn: float) -> str:
    """The amplitude that vLLM makes of both."""
    if not isinstance(factor, int | float) or factor < 1:
        return "(0.1 ln(factor) + 1) * attn_factor"
    return f"{(0.1 * math.log(factor) + 1) * attn:.6g}"


def _given(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings as they stand, without those that are null."""
    rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{source}: rotary settings are {rope!r}; expected an object or null")
    return {key: value for key, value in rope.items() if value is not None}


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _original_length(tree: dict[str, Any], rope: dict[str, Any], dense: bool) -> dict[str, Any]:
    """Find the original length: at the top level, in the settings, else the context length.

    The last does not hold for DeepSeek's families: without the key their own code takes 4096,
    transformers the context length. There it stays missing, and is refused.
    """
    length = tree.get(ORIGINAL)
    if length is None and ORIGINAL not in rope and dense:
        length = tree.get("max_position_embeddings")
    return {} if length is None else {ORIGINAL: length}


def _complete_yarn(
    scaling: dict[str, Any], tree: dict[str, Any], rope: dict[str, Any], dense: bool
) -> None:
    """What YaRN's missing and zero settings stand for, in place."""
    for key in ("beta_fast", "beta_slow"):
        if dense and scaling.get(key) == 0:
            del scaling[key]
    if dense and not (rope.get("mscale") and rope.get("mscale_all_dim")):
        # Either alone is ignored: the amplitude is 0.1 ln(factor) + 1.
        scaling.pop("mscale", None)
        scaling.pop("mscale_all_dim", None)
    given = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if "factor" in given and "factor" not in scaling:  # null: the ratio of the lengths
        length, original = tree.get("max_position_embeddings"), scaling.get(ORIGINAL)
        if isinstance(length, int) and isinstance(original, int) and original > 0:
            scaling["factor"] = length / original
