"""GGUF files of the dense families, seen as every other source of a model. No jax.

llama.cpp's format keeps weights under names of its own, mostly quantized, and beside them what else
a model needs: sizes, vocabulary, merges, chat template. All of it is read through the `gguf`
package, which belongs to the format. To us a weight is the float32 that llama.cpp computes with.

Two things are not as they look: rows of Llama's query and key weights lie permuted, so that
neighbours are rotated together; and Llama 3.1's rotary extension is a tensor, not a setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsjax.architecture import FAMILIES, DenseConfig
from dsjax.checkpoint.gguf_header import check_header
from dsjax.checkpoint.gguf_tokenizer import tokenizer_files
from dsjax.checkpoint.safetensors import InParts
from dsjax.config_files import parse_model
from dsjax.errors import UserError, one_line

if TYPE_CHECKING:
    from gguf import GGUFReader

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


@dataclass(frozen=True)
class GgufTensor(InParts):
    """A weight in the released order of its rows; see `source.Stored`."""

    file: Path
    shape: tuple[int, ...]
    heads: int
    """Over how many heads its rows lie permuted; 0 where they do not."""
    data: np.ndarray
    """Rows of quantized blocks, or of numbers."""
    kind: Any

    @property
    def dtype(self) -> str:
        """What its numbers are once they are made."""
        return "F32"

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to `end`, in the released order; only their rows are made."""
        width = math.prod(self.shape[1:])
        first, last = begin // width, -(-end // width)
        rows = self.data[self._stored(np.arange(first, last)) if self.heads else slice(first, last)]
        flat = self._numbers(rows).reshape(-1)
        return flat[begin - first * width : end - first * width]

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Where rows are in the file: a head's second half lies between the rows of its first."""
        size = self.shape[0] // self.heads
        head, row = np.divmod(rows, size)
        half, place = np.divmod(row, size // 2)
        return head * size + 2 * place + half

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        try:
            return dequantize(rows, self.kind)
        except NotImplementedError as error:
            raise UserError(
                f"{self.file}: {self.kind.name} is a quantization that the gguf "
                "package does not undo; take another file of the model"
            ) from error


def read_gguf(file: Path) -> tuple[DenseConfig, dict[str, GgufTensor], dict[str, bytes]]:
    """A file's architecture, its tensors under their released names, and its tokenizer's files.

    Raises:
        UserError: the `gguf` package is missing; the file is damaged, of another family, or holds
            something that would be lost.
    """
    reader, fields = _open(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, found.keys(), file)
    if (factors := found.pop(ROPE_FACTORS, None)) is not None:
        _check_rope_factors(factors.data, config, file)
    stored: dict[str, GgufTensor] = {}
    for tensor in found.values():
        name = _released_name(tensor.name)
        if name in stored:
            raise UserError(f"{file}: holds {name} twice; the second time as {tensor.name}")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = _heads(name, config)
        stored[name] = GgufTensor(file, shape, heads, tensor.data, tensor.tensor_type)
    return config, stored, tokenizer_files(fields, file)


def _open(file: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """The file, and its fields by name."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("reading GGUF needs the gguf package: pip install 'dsjax[gguf]'") from None
    try:
        check_header(file)
        reader = GGUFReader(file)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(f"{file}: cannot be read as GGUF: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------
# What the model is
# ---------------------------------------------------------------------------------------------


def _config(fields: dict[str, Any], names: Collection[str], file: Path) -> DenseConfig:
    """The architecture that the file's fields describe."""
    family = fields.get("general.architecture")
    dense = [name for name, kind in FAMILIES.items() if kind is DenseConfig]
    if family not in dense:
        known = ", ".join(dense)
        raise UserError(f"{file}: architecture {family!r}; GGUF files are read of {known}")

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"{family}.{name}", default)
        if not isinstance(value, int | float):
            found = "missing" if value is None else f"{value!r}, expected a number"
            raise UserError(f"{file}: the field '{family}.{name}' is {found}")
        return value

    if (scaling := fields.get(f"{family}.rope.scaling.type", "none")) != "none":
        raise UserError(f"{file}: rotary extension {scaling!r} is not read from GGUF files")
    heads, hidden = field("attention.head_count"), field("embedding_length")
    tokens = fields.get("tokenizer.ggml.tokens")
    config = {
        "model_type": family,
        "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
        "hidden_size": hidden,
        "num_hidden_layers": field("block_count"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _as_written(field("attention.layer_norm_rms_epsilon")),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": field("attention.key_length", hidden // max(heads, 1)),
        "rope_theta": _as_written(field("rope.freq_base", 10000.0)),
        "rope_scaling": LLAMA3 if ROPE_FACTORS in names else None,
        "intermediate_size": field("feed_forward_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    parsed = parse_model(config, source=str(file))
    assert isinstance(parsed, DenseConfig)  # no other family comes this far
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


def _released_name(name: str) -> str:
    """The released name; what is not known keeps its own, and is told of as unknown."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    known = _LAYER_NAMES if match and match[1] else _NAMES
    if match is None or match[2] not in known:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{known[match[2]]}.{match[3]}"


def _heads(name: str, config: DenseConfig) -> int:
    if config.model_type == "llama" and ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if config.model_type == "llama" and ".k_proj." in name else 0
