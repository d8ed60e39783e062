"""Typed, frozen, validated configuration of a run; `dsjax.architecture` says what a model is.

`dsjax.config_files` reads it. Nothing here imports jax, so that a command which only reads headers
starts at once.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dsjax.architecture import ModelConfig, Section

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _parse_count(value: Any) -> Any:
    """Read "14.8T" as 14_800_000_000_000; leave everything else to pydantic."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+)([KMBT])", value.strip())):
        return round(float(match[1]) * _SUFFIXES[match[2]])
    return value


Count = Annotated[int, BeforeValidator(_parse_count), Field(ge=0)]
"""A number of tokens or bytes; YAML may say 469B or 14.8T."""


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


class DcnConfig(Section):
    """Slices along each axis, over the slow network between them."""

    data: int = Field(default=1, ge=1)
    fsdp: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)


Box = Annotated[list[Annotated[int, Field(ge=1)]], Field(max_length=3)]
"""Chips along each dimension of a torus."""


MOST_CPU_DEVICES = 64
"""Each has threads of its own; more are rather a mistake."""


class MeshConfig(Section):
    """Devices along each named axis of a slice; the one that is `auto` takes what the others leave.

    An axis is as long as its size here times its size in `dcn`.
    """

    data: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    fsdp: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    expert: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)
    dcn: DcnConfig = DcnConfig()
    boxes: dict[str, Box] = Field(default={})
    """Chips of a TPU slice's torus that an axis spans, such as `{expert: [4, 2, 1]}`; one axis
    takes what is left. By default jax chooses."""
    cpu_devices: int = Field(default=1, ge=1, le=MOST_CPU_DEVICES)
    """How many a CPU stands for, where there is no accelerator; more, if the sizes ask for more."""


class DistributedConfig(Section):
    """How processes find one another; sharding/distributed.py says what happens without it."""

    coordinator_address: str | None = Field(default=None, pattern=r".+:\d+$")
    """HOST:PORT of process 0."""
    num_processes: int | None = Field(default=None, ge=1)
    process_id: int | None = Field(default=None, ge=0)
    initialization_timeout: int = Field(default=300, gt=0)
    """Seconds that the first process waits for the last one at the start."""


class SourceConfig(Section):
    """One source of documents. `path` is a glob, or `python-stdlib` for kind text."""

    kind: Literal["text", "jsonl", "parquet", "array_record"] = "text"
    path: str
    weight: float = Field(1.0, gt=0)
    text_key: str = "text"


class RowsConfig(Section):
    """Rows of tokens, whatever they are made of."""

    sequence_length: int = Field(gt=1)
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    deduplicate: bool = True


class DataConfig(RowsConfig):
    """Where documents come from and how they become rows of tokens."""

    sources: list[SourceConfig] = Field(min_length=1)
    tokenizer: str | None = None
    """A tokenizer.json, Kimi's tiktoken.model or a folder that holds one; None trains a byte-level
    BPE on the sources."""
    tokenizer_train_bytes: Count = 20_000_000
    shuffle_window: int = Field(1024, gt=0)
    """Rows of a source that are shuffled together, and read anew when a run is resumed."""
    streams: int = Field(1, gt=0)
    """Streams of documents that the rows of a batch are dealt from: a process tokenizes only those
    of its rows. It stays the same for the life of a run."""
    fim_rate: float = Field(0.1, ge=0, le=1)


class OptimizerConfig(Section):
    """AdamW as in DeepSeek-V3 (arXiv:2412.19437) section 4.2."""

    learning_rate: Schedule
    warmup_steps: int = Field(2000, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)


class StepConfig(Section):
    """How the step of a run computes, whatever its loss is."""

    microbatch_size: int = Field(gt=0)
    """Rows, over all devices, whose gradients are made at once."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal[
        "keep_all",
        "keep_matmuls",
        "keep_attention",
        "keep_layer_inputs",
        "keep_layer_inputs_on_host",
    ] = "keep_layer_inputs"
    loss_chunk: int = Field(512, gt=0)
    """Positions of a row whose logits exist at the same time."""
    balance_loss_weight: float = Field(1e-4, ge=0)
    max_bad_steps: int = Field(5, gt=0)


class LoopConfig(StepConfig):
    """The training loop: how much at once, and which losses."""

    max_steps: int | None = Field(None, gt=0)
    batch_size: Schedule
    mtp_weight: Schedule = Field([Stage(value=0.3)])
    bias_update_rate: Schedule = Field([Stage(value=0.001)])

    @model_validator(mode="after")
    def _check(self) -> Self:
        for stage in self.batch_size:
            if stage.value < self.microbatch_size or stage.value % self.microbatch_size:
                raise ValueError(
                    f"batch_size={stage.value:g} is not a multiple of "
                    f"microbatch_size={self.microbatch_size}; choose one that is"
                )
        return self


class TrainingConfig(LoopConfig):
    """The training loop, and how long it goes on."""

    tokens: Count = Field(gt=0)


class CheckpointConfig(Section):
    """How often the whole state is saved, and how many saves are kept."""

    every_steps: int = Field(gt=0)
    keep: int = Field(3, gt=0)


class HeldOutConfig(Section):
    """Held-out evaluation while training."""

    every_steps: int = Field(gt=0)
    batches: int = Field(8, gt=0)


class EvaluationConfig(HeldOutConfig):
    """Held-out evaluation while training, and what a finished run writes."""

    sample_tokens: int = Field(0, ge=0)


class ProfileConfig(Section):
    """Which steps are traced by `jax.profiler`; the first ones of a run are not typical."""

    start_step: int = Field(10, gt=0)
    steps: int = Field(3, gt=0)


class RunConfig(Section):
    """What a run of any task is made of; each task's own class adds the rest."""

    task: str
    run_dir: str
    seed: int = Field(0, ge=0)
    model: ModelConfig
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    rules: dict[str, list[str]] = Field({})
    optimizer: OptimizerConfig
    training: StepConfig
    checkpoint: CheckpointConfig
    profile: ProfileConfig | None = None


class TrainRunConfig(RunConfig):
    """A run of the training loop, whatever its rows are made of."""

    data: RowsConfig
    training: LoopConfig
    evaluation: HeldOutConfig

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
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


class PretrainConfig(TrainRunConfig):
    """A run that trains on documents."""

    task: Literal["pretrain"] = "pretrain"
    data: DataConfig
    training: TrainingConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        if self.training.microbatch_size % self.data.streams:
            raise ValueError(
                f"training.microbatch_size={self.training.microbatch_size} rows cannot be dealt "
                f"from data.streams={self.data.streams} streams; choose a divisor"
            )
        return self
