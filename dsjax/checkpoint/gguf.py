"""GGUF files of the dense families, seen as every other source of a model. No jax.

llama.cpp's format keeps weights under names of its own, mostly quantized, and beside them what else
a model needs: sizes, vocabulary, merges, chat template. All of it is read through the `gguf`
package, which belongs to the format. To us a weight is the float32 that llama.cpp computes with.

Not as it looks: rows of Llama's query and key weights lie permuted, so that neighbours are rotated
together. Rotary extensions are in `gguf_rotary.py`.
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
from dsjax.checkpoint.gguf_rotary import (
    ROPE_FACTORS,
    as_written,
    check_rope_factors,
    read_scaling,
)
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


@dataclass(frozen=True)
class GgufTensor(InParts):
    """A weight in the released order of its rows; see `safetensors.Stored`."""

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
    found = [(file, tensor) for tensor in reader.tensors]
    for part in _other_parts(file, fields):
        found += [(part, tensor) for tensor in _open(part)[0].tensors]
    config = _config(fields, {tensor.name for _, tensor in found}, file)
    stored: dict[str, GgufTensor] = {}
    for part, tensor in found:
        if tensor.name == ROPE_FACTORS:
            check_rope_factors(tensor.data, config, part)
            continue
        name = _released_name(tensor.name)
        if name in stored:
            raise UserError(f"{part}: holds {name} twice; the second time as {tensor.name}")
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = _heads(name, config)
        stored[name] = GgufTensor(part, shape, heads, tensor.data, tensor.tensor_type)
    return config, stored, tokenizer_files(fields, file)


def _other_parts(file: Path, fields: dict[str, Any]) -> list[Path]:
    """The other files of a model that llama.cpp's `gguf-split` cut; the first has the settings.

    Raises:
        UserError: this is not the first of them, or one is missing.
    """
    count, number = fields.get("split.count", 1), fields.get("split.no", 0)
    if not isinstance(count, int) or count < 2:
        return []
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", file.name)
    if match is None or int(match[2]) != count:
        raise UserError(
            f"{file}: part {number} of a model in {count} files (split.count), which must be named "
            f"NAME-00001-of-{count:05}.gguf; give them their names back"
        )
    parts = [file.with_name(f"{match[1]}-{i + 1:05}-of-{match[2]}.gguf") for i in range(count)]
    if file != parts[0]:
        raise UserError(f"{file}: part of a model in {count} files; give the first, {parts[0]}")
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"{missing[0]}: is missing; the model is in {count} files, fetch them all")
    return parts[1:]


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

    scaling = read_scaling(fields, family, factors=ROPE_FACTORS in names, file=file)
    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", hidden // max(heads, 1))
    if (turned := field("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"{file}: {family}.rope.dimension_count={turned}: only whole heads of {head_dim} are "
            "rotated here"
        )
    tokens = fields.get("tokenizer.ggml.tokens")
    config = {
        "model_type": family,
        "vocab_size": len(tokens) if isinstance(tokens, list) else 0,
        "hidden_size": hidden,
        "num_hidden_layers": field("block_count"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": as_written(field("attention.layer_norm_rms_epsilon")),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": as_written(field("rope.freq_base", 10000.0)),
        "rope_scaling": scaling,
        "intermediate_size": field("feed_forward_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(fields),
    }
    parsed = parse_model(config, source=str(file))
    assert isinstance(parsed, DenseConfig)  # no other family comes this far
    return parsed


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


def _ends(fields: dict[str, Any]) -> list[Any] | None:
    """What ends an answer: of a text, a turn, and a message that calls a tool."""
    named = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return [token for token in named if token is not None] or None


def _heads(name: str, config: DenseConfig) -> int:
    if config.model_type == "llama" and ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if config.model_type == "llama" and ".k_proj." in name else 0
