"""GGUF files of the dense families, made into a Hugging Face folder.

llama.cpp's format keeps weights under names of its own, mostly quantized, and beside them what else
a model needs: sizes, vocabulary, merges, chat template. All of it is read through the `gguf`
package, which belongs to the format, and written as the folder that every door of ours opens; the
values are those that llama.cpp computes with, in float32 or rounded to bfloat16. No jax.

Two things are not as they look: rows of Llama's query and key weights lie permuted, so that
neighbours are rotated together; and Llama 3.1's rotary extension is a tensor, not a setting.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsjax.architecture import FAMILIES, DenseConfig
from dsjax.checkpoint.export_config import make_config, to_bytes, with_dtype
from dsjax.checkpoint.families import tensors
from dsjax.checkpoint.gguf_tokenizer import write_tokenizer
from dsjax.checkpoint.safetensors import DTYPES
from dsjax.config_files import parse_model
from dsjax.errors import UserError, one_line

if TYPE_CHECKING:
    from gguf import GGUFReader

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The one extension that is known in this form: that of Llama 3.1 and its distills."""


class _Stored(NamedTuple):
    """A tensor of the file: rows of quantized blocks, or of numbers."""

    data: np.ndarray
    kind: Any


def convert_gguf(file: Path, folder: Path, dtype: str = "float32") -> None:
    """Write `folder`, which must not exist, from a GGUF file.

    One tensor at a time is in memory, and of the largest a part of its rows.

    Raises:
        UserError: the `gguf` package is missing; the file is damaged, of another family, or holds
            something that would be lost; the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; remove it, or choose another name")
    reader = _open(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    stored = {t.name: _Stored(t.data, t.tensor_type) for t in reader.tensors}
    config = _config(fields, stored, file)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tree = with_dtype(make_config(config), DTYPE_NAMES[dtype])
        (partial / "config.json").write_bytes(to_bytes(tree))
        write_tokenizer(fields, partial, file)
        _write_weights(partial, stored, config, DTYPE_NAMES[dtype], file)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF needs the gguf package: pip install 'dsjax[gguf]'") from None
    try:
        return GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(f"{file}: cannot be read as GGUF: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------
# What the model is
# ---------------------------------------------------------------------------------------------


def _config(fields: dict[str, Any], stored: dict[str, _Stored], file: Path) -> DenseConfig:
    """The architecture that the file's fields describe."""
    family = fields.get("general.architecture")
    dense = [name for name, kind in FAMILIES.items() if kind is DenseConfig]
    if family not in dense:
        known = ", ".join(dense)
        raise UserError(f"{file}: architecture {family!r}; GGUF files are read of {known}")

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{name}", default)
        if value is None:
            raise UserError(f"{file}: the field '{family}.{name}' is missing")
        return value

    if (scaling := fields.get(f"{family}.rope.scaling.type", "none")) != "none":
        raise UserError(f"{file}: rotary extension {scaling!r} is not read from GGUF files")
    heads, hidden = field("attention.head_count"), field("embedding_length")
    config = {
        "model_type": family,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden,
        "num_hidden_layers": field("block_count"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _as_written(field("attention.layer_norm_rms_epsilon")),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", hidden // heads),
        "rope_theta": _as_written(field("rope.freq_base", 10000.0)),
        "rope_scaling": LLAMA3 if ROPE_FACTORS in stored else None,
        "intermediate_size": field("feed_forward_length"),
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    parsed = parse_model(config, source=str(file))
    assert isinstance(parsed, DenseConfig)  # no other family comes this far
    if ROPE_FACTORS in stored:
        _check_rope_factors(stored[ROPE_FACTORS].data, parsed, file)
    return parsed


def _as_written(value: float) -> float:
    """The shortest decimal that is this float32: 1e-5, where the file has 9.99999975e-6."""
    return float(str(np.float32(value)))


def _check_rope_factors(factors: np.ndarray, config: DenseConfig, file: Path) -> None:
    """By how much each pair is slowed down must be what Llama 3.1 does."""
    pairs = np.arange(config.head_dim // 2)
    turns = config.rope_theta ** (-2.0 * pairs / config.head_dim) / (2 * np.pi)
    turns *= LLAMA3["original_max_position_embeddings"]
    width = LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"]
    kept = np.clip((turns - LLAMA3["low_freq_factor"]) / width, 0, 1)
    expected = 1 / (kept + (1 - kept) / LLAMA3["factor"])
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(f"{file}: {ROPE_FACTORS} is another rotary extension than Llama 3.1's")


# ---------------------------------------------------------------------------------------------
# Its weights
# ---------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 4096


def _write_weights(
    folder: Path,
    stored: dict[str, _Stored],
    config: DenseConfig,
    dtype: str,
    file: Path,
) -> None:
    """`model.safetensors`, its tensors one after the other."""
    names = {_released_name(name, file): name for name in stored if name != ROPE_FACTORS}
    expected = {tensor.name: tensor.shape for tensor in tensors(config)}
    if names.keys() != expected.keys():
        odd = sorted(names.keys() ^ expected.keys())
        raise UserError(
            f"{file}: {len(odd)} weights are missing or unknown: {', '.join(odd[:3])}; "
            "its fields and its tensors do not belong together"
        )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in expected.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in expected.items():
            where = f"{file}: {names[name]}"
            for rows in _rows(stored[names[name]], shape, _heads(name, config), where):
                out.write(rows.astype(DTYPES[dtype]).tobytes())


def _released_name(name: str, file: Path) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    known = _LAYER_NAMES if match and match[1] else _NAMES
    if match is None or match[2] not in known:
        raise UserError(f"{file}: {name!r} is no weight of a dense family as GGUF names them")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{known[match[2]]}.{match[3]}"


def _heads(name: str, config: DenseConfig) -> int | None:
    """Over how many heads a weight's rows lie permuted; None where they do not."""
    if config.model_type != "llama":
        return None
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def _rows(
    stored: _Stored, shape: tuple[int, ...], heads: int | None, where: str
) -> Iterator[np.ndarray]:
    """The weight in float32, some rows at a time; all at once where rows lie permuted."""
    at_once = len(stored.data) if heads else ROWS_AT_ONCE
    done = 0
    for begin in range(0, len(stored.data), at_once):
        rows = _numbers(stored.data[begin : begin + at_once], stored.kind, where)
        if rows.shape[1:] != shape[1:]:
            raise UserError(f"{where} has rows of {rows.shape[1:]}, expected {shape[1:]}")
        if not np.isfinite(rows).all():
            raise UserError(f"{where} holds NaN or infinity; fetch it again")
        done += len(rows)
        yield rows if heads is None else _unpermuted(rows, heads)
    if done != shape[0]:
        raise UserError(f"{where} has {done} rows, expected {shape[0]}")


def _numbers(data: np.ndarray, kind: Any, where: str) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        return dequantize(data, kind)
    except NotImplementedError as error:
        raise UserError(f"{where} is stored as {kind.name}, which is not read") from error


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF puts row i + R/2 of a head behind row i; the released weights pair its two halves."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
