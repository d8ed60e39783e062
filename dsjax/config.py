"""Typed, frozen, validated configuration: what a model is and what a run does.

`dsjax.config_files` reads it. Nothing here imports jax, so that a command which only reads headers
starts at once. Field names of `ModelConfig` are those of the released `config.json` files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _parse_count(value: Any) -> Any:
    """Read "14.8T" as 14_800_000_000_000; leave everything else to pydantic."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+)([KMBT])", value.strip())):
        return round(float(match[1]) * _SUFFIXES[match[2]])
    return value


Count = Annotated[int, BeforeValidator(_parse_count), Field(ge=0)]
"""A number of tokens or bytes; YAML may say 469B or 14.8T."""


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


class YarnConfig(Section):
    """YaRN context extension (arXiv:2309.00071), with DeepSeek's two mscales."""

    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class ModelConfig(Section):
    """The architecture, under the names of the released `config.json`.

    DeepSeek-V3 (arXiv:2412.19437) section 4.2 gives the values of the 671B model.
    `num_experts_per_tok` is K, `n_routed_experts` N_r, `n_shared_experts` N_s,
    `q_lora_rank` d'_c, `kv_lora_rank` d_c, `qk_rope_head_dim` d_h^R of the paper.
    """

    model_type: Literal["deepseek_v3", "deepseek_v2", "kimi_k2"] = "deepseek_v3"

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.006, gt=0)
    embedding_initializer_range: float | None = Field(None, gt=0)
    """Of the token embedding; None: like all the rest, as DeepSeek trains. A model that sees few
    tokens learns faster when they are not small beside what attention adds to them."""

    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None = Field(None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: YarnConfig | None = None

    first_k_dense_replace: int = Field(0, ge=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(0, ge=0)
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: int = Field(0, ge=0)

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for wrong, message in self._problems():
            if wrong:
                raise ValueError(message)
        return self

    def _problems(self) -> Iterator[tuple[bool, str]]:
        """Every combination that cannot work: whether it is there, and what to say of it."""
        c = self
        yield (
            c.qk_rope_head_dim % 2 != 0,
            f"qk_rope_head_dim={c.qk_rope_head_dim} is odd, but rotary pairs need an even number; "
            f"choose {c.qk_rope_head_dim + 1}",
        )
        for few, many in (
            ("num_experts_per_tok", "n_routed_experts"),
            ("topk_group", "n_group"),
            ("first_k_dense_replace", "num_hidden_layers"),
        ):
            less, more = getattr(c, few), getattr(c, many)
            message = f"{few}={less} is more than {many}={more}; choose at most that many"
            yield less > more, message
        yield (
            c.n_routed_experts % c.n_group != 0,
            f"n_routed_experts={c.n_routed_experts} is not divisible by n_group={c.n_group}; "
            "choose a divisor",
        )
        group = c.n_routed_experts // c.n_group
        yield (
            c.num_experts_per_tok > group * c.topk_group,
            f"num_experts_per_tok={c.num_experts_per_tok} is more than the {group * c.topk_group} "
            f"experts of topk_group={c.topk_group} groups; raise topk_group",
        )
        yield (
            c.topk_method == "noaux_tc" and c.n_group > 1 and group < 2,
            f"groups of {group} expert have no two largest scores; "
            "noaux_tc needs at least 2 experts a group: lower n_group",
        )
        yield (
            c.topk_method == "greedy" and c.n_group > 1,
            f"topk_method=greedy knows no groups, but n_group={c.n_group}; "
            "use group_limited_greedy or n_group=1",
        )
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(c, name)
            outside = token is not None and not 0 <= token < c.vocab_size
            yield outside, f"{name}={token} is outside vocab_size={c.vocab_size}"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the no-rope part, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with routed experts; MTP layers are not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def has_router_bias(self) -> bool:
        """Whether a bias steers the choice of experts (`noaux_tc`, V3's balancing)."""
        return self.topk_method == "noaux_tc"


# ---------------------------------------------------------------------------------------------
# Schedules: one mechanism for learning rate, batch size, lambda and gamma
# ---------------------------------------------------------------------------------------------


class Stage(Section):
    """One piece of a schedule: it ends after `until` tokens, at `value`.

    A constant stage holds `value`; a linear or cosine one moves there from the value of the
    stage before it.
    """

    value: float
    until: Count | None = None
    shape: Literal["constant", "linear", "cosine"] = "constant"


def _scalar_schedule(value: Any) -> Any:
    return [{"value": value}] if isinstance(value, int | float | str) else value


def _check_stages(stages: list[Stage]) -> list[Stage]:
    if stages[0].shape != "constant":
        raise ValueError("the first stage has nothing to move from; make it constant")
    if stages[-1].until is None and stages[-1].shape != "constant":
        raise ValueError(f"a {stages[-1].shape} stage needs `until`, the tokens where it arrives")
    ends = [stage.until for stage in stages]
    if None in ends[:-1]:
        raise ValueError("only the last stage may leave `until` out")
    finite = [end for end in ends if end is not None]
    if finite != sorted(set(finite)):
        raise ValueError(f"stages must end one after the other, but `until` reads {finite}")
    return stages


Schedule = Annotated[
    list[Stage],
    BeforeValidator(_scalar_schedule),
    Field(min_length=1),
    AfterValidator(_check_stages),
]
"""A value over the tokens seen so far. A plain number is a constant schedule."""


def schedule_value(stages: list[Stage], tokens: int) -> float:
    """The schedule's value once `tokens` tokens have been seen; the last value stays for good.

    >>> warm = [Stage(value=0.0, until=0), Stage(value=8.0, until=100, shape="linear")]
    >>> schedule_value(warm, 25), schedule_value(warm, 500)
    (2.0, 8.0)
    """
    begin, before = 0, stages[0].value
    for stage in stages:
        if stage.until is None or tokens < stage.until:
            if stage.until is None or stage.shape == "constant":
                return stage.value
            done = (tokens - begin) / (stage.until - begin)
            if stage.shape == "cosine":
                done = 0.5 * (1.0 - math.cos(math.pi * done))
            return before + (stage.value - before) * done
        begin, before = stage.until, stage.value
    return before


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


class MeshConfig(Section):
    """Devices along each named axis; `fsdp: auto` takes all that the others leave."""

    data: int = Field(default=1, ge=1)
    fsdp: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    expert: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)


class SourceConfig(Section):
    """One source of documents. `path` is a glob, or `python-stdlib` for kind text."""

    kind: Literal["text", "jsonl", "parquet", "array_record"] = "text"
    path: str
    weight: float = Field(1.0, gt=0)
    text_key: str = "text"


class DataConfig(Section):
    """Where documents come from and how they become rows of tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one; None trains a byte-level BPE on the sources."""
    tokenizer_train_bytes: Count = 20_000_000
    sequence_length: int = Field(gt=1)
    shuffle_window: int = Field(1024, gt=0)
    """Rows of a source that are shuffled together, and read anew when a run is resumed."""
    fim_rate: float = Field(0.1, ge=0, le=1)
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    deduplicate: bool = True


class OptimizerConfig(Section):
    """AdamW as in DeepSeek-V3 (arXiv:2412.19437) section 4.2."""

    learning_rate: Schedule
    warmup_steps: int = Field(2000, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)


class TrainingConfig(Section):
    """The training loop: how long, how much at once, and which losses."""

    tokens: Count = Field(gt=0)
    max_steps: int | None = Field(None, gt=0)
    batch_size: Schedule
    microbatch_size: int = Field(gt=0)
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["keep_all", "keep_matmuls", "keep_layer_inputs"] = "keep_layer_inputs"
    loss_chunk: int = Field(512, gt=0)
    mtp_weight: Schedule = [Stage(value=0.3)]
    bias_update_rate: Schedule = [Stage(value=0.001)]
    balance_loss_weight: float = Field(1e-4, ge=0)
    max_bad_steps: int = Field(5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage in self.batch_size:
            if stage.value < self.microbatch_size or stage.value % self.microbatch_size:
                raise ValueError(
                    f"batch_size={stage.value:g} is not a multiple of "
                    f"microbatch_size={self.microbatch_size}; choose one that is"
                )
        return self


class CheckpointConfig(Section):
    """How often the whole state is saved, and how many saves are kept."""

    every_steps: int = Field(gt=0)
    keep: int = Field(3, gt=0)


class EvaluationConfig(Section):
    """Held-out evaluation while training, and what a finished run writes."""

    every_steps: int = Field(gt=0)
    batches: int = Field(8, gt=0)
    sample_tokens: int = Field(0, ge=0)


class RunConfig(Section):
    """Everything a training run is made of."""

    task: Literal["pretrain"] = "pretrain"
    run_dir: str
    seed: int = Field(0, ge=0)
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    rules: dict[str, list[str]] = {}
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is beyond "
                f"model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        if self.data.sequence_length <= self.model.num_nextn_predict_layers + 1:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} leaves no target for "
                f"{self.model.num_nextn_predict_layers} MTP layers; choose a longer one"
            )
        return self
