"""Names of the released weights: one table, read in both directions.

DeepSeek-V3 and R1, V2, Moonlight and Kimi-K2 call their weights the same, and so do Llama, Qwen2
and Qwen3 what they have in common with them: a family is what its config leaves of the rows. A row
joins a parameter of ours to the tensors that hold it in the released files. Our parameters keep the
layout of the file, [out, in], so a row needs no transformation: our array is the file's tensors,
reshaped and stacked over layers and experts, and exporting is the same sentence read backwards.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsjax.architecture import DeepSeekConfig, DenseConfig, ModelConfig
from dsjax.errors import UserError
from dsjax.numerics.fp8_host import scale_shape

KINDS = (
    EMBEDDING := "embedding",
    HEAD := "head",
    NORM := "norms",
    ATTENTION := "attention",
    BIAS := "attention biases",
    DENSE := "dense feed-forward",
    ROUTED := "routed experts",
    SHARED := "shared experts",
    ROUTER := "router",
    ROUTER_BIAS := "router bias",
    PROJECTION := "MTP projection",
)
"""What a weight is for, in the words and the order of a report."""

QUANTIZED = {ATTENTION, DENSE, ROUTED, SHARED}
"""What the FP8 releases store as e4m3, with a float32 scale for each block of 128 x 128."""

FP8 = "F8_E4M3"


class Described(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        ...


@dataclass(frozen=True)
class Row:
    """One kind of weight: our path, the released name, its shape, and what it is for.

    The shape names dimensions. Parentheses hold what the file merges: "(heads query) q_lora" is
    two dimensions there and three in the model. `repeats` names the tensor that this one stores a
    second time: it is no parameter of its own.
    """

    path: str
    name: str
    shape: str
    kind: str
    repeats: str | None = None


_TOP = (
    Row("embed.weight", "model.embed_tokens.weight", "vocab embed", EMBEDDING),
    Row("norm.weight", "model.norm.weight", "embed", NORM),
    Row("head.weight", "lm_head.weight", "untied embed", HEAD),
)
_BLOCK = (
    Row("attn_norm.weight", "input_layernorm.weight", "embed", NORM),
    Row("attn.q.weight", "self_attn.q_proj.weight", "(heads query) direct", ATTENTION),
    Row("attn.q_a.weight", "self_attn.q_a_proj.weight", "q_lora embed", ATTENTION),
    Row("attn.q_a_norm.weight", "self_attn.q_a_layernorm.weight", "q_lora", NORM),
    Row("attn.q_b.weight", "self_attn.q_b_proj.weight", "(heads query) q_lora", ATTENTION),
    Row("attn.kv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", "latent embed", ATTENTION),
    Row("attn.kv_a_norm.weight", "self_attn.kv_a_layernorm.weight", "kv_lora", NORM),
    Row("attn.kv_b.weight", "self_attn.kv_b_proj.weight", "(heads key_value) kv_lora", ATTENTION),
    Row("attn.q.weight", "self_attn.q_proj.weight", "(heads head) embed", ATTENTION),
    Row("attn.q.bias", "self_attn.q_proj.bias", "(heads biased)", BIAS),
    Row("attn.k.weight", "self_attn.k_proj.weight", "(few head) embed", ATTENTION),
    Row("attn.k.bias", "self_attn.k_proj.bias", "(few biased)", BIAS),
    Row("attn.v.weight", "self_attn.v_proj.weight", "(few head) embed", ATTENTION),
    Row("attn.v.bias", "self_attn.v_proj.bias", "(few biased)", BIAS),
    Row("attn.q_norm.weight", "self_attn.q_norm.weight", "normed", NORM),
    Row("attn.k_norm.weight", "self_attn.k_norm.weight", "normed", NORM),
    Row("attn.out.weight", "self_attn.o_proj.weight", "embed (heads value)", ATTENTION),
    Row("ffn_norm.weight", "post_attention_layernorm.weight", "embed", NORM),
)
_DENSE = (
    *_BLOCK,
    Row("ffn.gate.weight", "mlp.gate_proj.weight", "mlp embed", DENSE),
    Row("ffn.up.weight", "mlp.up_proj.weight", "mlp embed", DENSE),
    Row("ffn.down.weight", "mlp.down_proj.weight", "embed mlp", DENSE),
)
_MOE = (
    *_BLOCK,
    Row("ffn.router.weight", "mlp.gate.weight", "experts embed", ROUTER),
    Row("ffn.router.bias", "mlp.gate.e_score_correction_bias", "steered", ROUTER_BIAS),
    Row("ffn.experts.gate", "mlp.experts.{expert}.gate_proj.weight", "routed embed", ROUTED),
    Row("ffn.experts.up", "mlp.experts.{expert}.up_proj.weight", "routed embed", ROUTED),
    Row("ffn.experts.down", "mlp.experts.{expert}.down_proj.weight", "embed routed", ROUTED),
    Row("ffn.shared.gate.weight", "mlp.shared_experts.gate_proj.weight", "shared embed", SHARED),
    Row("ffn.shared.up.weight", "mlp.shared_experts.up_proj.weight", "shared embed", SHARED),
    Row("ffn.shared.down.weight", "mlp.shared_experts.down_proj.weight", "embed shared", SHARED),
)
_MTP = (
    Row("enorm.weight", "enorm.weight", "embed", NORM),
    Row("hnorm.weight", "hnorm.weight", "embed", NORM),
    Row("eh_proj.weight", "eh_proj.weight", "embed two_embeds", PROJECTION),
    Row("norm.weight", "shared_head.norm.weight", "embed", NORM),
    Row("", "embed_tokens.weight", "vocab embed", EMBEDDING, repeats="model.embed_tokens.weight"),
    Row("", "shared_head.head.weight", "vocab embed", HEAD, repeats="lm_head.weight"),
)


def _sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of the dimensions; one of size 0 takes the rows that have it out of the model."""
    c = config
    everywhere = {
        "vocab": c.vocab_size,
        "untied": 0 if c.tie_word_embeddings else c.vocab_size,
        "embed": c.hidden_size,
        "heads": c.num_attention_heads,
        "mlp": c.intermediate_size,
    }
    theirs = _deepseek_sizes(c) if isinstance(c, DeepSeekConfig) else _dense_sizes(c)
    return defaultdict(int, everywhere | theirs)


def _deepseek_sizes(c: DeepSeekConfig) -> dict[str, int]:
    return {
        "two_embeds": 2 * c.hidden_size,
        "query": c.qk_head_dim,
        "q_lora": c.q_lora_rank or 0,
        "direct": c.hidden_size if c.q_lora_rank is None else 0,
        "latent": c.kv_lora_rank + c.qk_rope_head_dim,
        "kv_lora": c.kv_lora_rank,
        "key_value": c.qk_nope_head_dim + c.v_head_dim,
        "value": c.v_head_dim,
        "experts": c.n_routed_experts,
        "steered": c.n_routed_experts if c.has_router_bias else 0,
        # Widths of one routed expert, and of all shared ones together.
        "routed": c.moe_intermediate_size,
        "shared": c.n_shared_experts * c.moe_intermediate_size,
    }


def _dense_sizes(c: DenseConfig) -> dict[str, int]:
    return {
        "few": c.num_key_value_heads,
        "head": c.head_dim,
        "value": c.head_dim,
        "biased": c.head_dim if c.qkv_bias else 0,
        "normed": c.head_dim if c.qk_norm else 0,
    }


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the released files, and its place in our parameters.

    `shape` is the file's. Reshaped to `inner` it is item `index` of the parameter at `path`:
    () where nothing is stacked, (layer,) or (layer, expert) within its stack.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[int, ...]
    inner: tuple[int, ...]
    kind: str
    repeats: str | None

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def scale(self) -> tuple[str, tuple[int, ...]] | None:
        """Name and shape of the scales beside it in an FP8 release; None if it has none."""
        if self.kind not in QUANTIZED:
            return None
        rows, columns = self.shape
        return f"{self.name}_scale_inv", scale_shape((rows, columns))


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the released files of this model, scales apart, MTP's repeats included."""
    first, last = config.first_k_dense_replace, config.num_hidden_layers
    ahead = range(last, last + config.num_nextn_predict_layers)
    for row in _TOP:
        yield from _expand(row, "", None, config)
    for prefix, rows, layers in (
        ("dense_layers.", _DENSE, range(first)),
        ("moe_layers.", _MOE, range(first, last)),
        ("mtp.block.", _MOE, ahead),
        ("mtp.", _MTP, ahead),
    ):
        for row in rows:
            yield from _expand(row, prefix, layers, config)


def _expand(row: Row, prefix: str, layers: range | None, config: ModelConfig) -> Iterator[Tensor]:
    """A row's tensors over its layers and experts."""
    sizes = _sizes(config)
    merged = [
        [sizes[name] for name in group.strip("()").split()]
        for group in re.findall(r"\(.+?\)|\w+", row.shape)
    ]
    shape = tuple(math.prod(group) for group in merged)
    if 0 in shape:
        return
    inner = tuple(size for group in merged for size in group)
    path = "" if row.repeats else prefix + row.path
    for name, index in _places(row, layers, config.n_routed_experts):
        yield Tensor(name, shape, path, index, inner, row.kind, row.repeats)


def _places(row: Row, layers: range | None, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and index of each of a row's tensors."""
    if layers is None:
        yield row.name, ()
        return
    for i, layer in enumerate(layers):
        name = f"model.layers.{layer}.{row.name}"
        if row.kind == ROUTED:
            for expert in range(experts):
                yield name.format(expert=expert), (i, expert)
        else:
            yield name, (i,)


def without_absent_mtp(config: ModelConfig, stored: Mapping[str, Described]) -> ModelConfig:
    """The same model without MTP layers if the files hold not one tensor of theirs.

    The transformers library writes such folders: it drops the weights and keeps the config's key.
    """
    ahead = range(
        config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers
    )
    prefixes = tuple(f"model.layers.{layer}." for layer in ahead)
    if any(name.startswith(prefixes) for name in stored):
        return config
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def match(config: ModelConfig, stored: Mapping[str, Described], source: Path) -> list[Tensor]:
    """Account for every stored tensor and every weight of the model; return the model's.

    Raises:
        UserError: once, with all that are missing, unknown or misshaped.
    """
    expected = list(tensors(config))
    shapes = {tensor.name: tensor.shape for tensor in expected}
    for tensor in expected:
        entry = stored.get(tensor.name)
        if entry and entry.dtype == FP8 and (scale := tensor.scale):
            shapes.update([scale])
    problems = {
        "missing": [name for name in shapes if name not in stored],
        "unknown": [name for name in stored if name not in shapes],
        "misshaped": [
            f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for problem, names in problems.items()
            if names
        )
        raise UserError(f"{source}: the tensors are not those of config.json's model: {found}")
    return expected
