"""What a model is: the architecture of each family, under the names of its `config.json`.

Nothing here imports jax, so that a command which only reads headers starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Size = Annotated[int, Field(gt=0, lt=1 << 31, strict=True)]
"""A size or a position, which devices count in 32 bits. True and "3" and 3.0 are none."""

SizeOrZero = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
"""The same where there may be none."""

MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000
"""In all layers together: every tensor is accounted for by name, in memory, and a config that says
more says it by mistake. Kimi-K2 has 23,424."""


MAX_EOS_TOKENS = 8
"""More than any release names; each takes a slot in the sampler."""


class LinearConfig(Section):
    """Linear position interpolation (arXiv:2306.15595): every frequency is divided by `factor`."""

    rope_type: Literal["linear"]
    factor: float = Field(gt=0)


class YarnConfig(Section):
    """YaRN context extension (arXiv:2309.00071), with DeepSeek's two mscales."""

    factor: float = Field(gt=0)
    original_max_position_embeddings: Size
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(0.0, ge=0)
    attention_factor: float | None = Field(None, ge=0)
    """Factor on cos and sin; None: the ratio that the two mscales give."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded outwards to whole pairs."""


class Llama3Config(Section):
    """Llama 3.1's context extension: slow pairs are interpolated, fast ones stay as they are."""

    factor: float = Field(gt=0)
    original_max_position_embeddings: Size
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        return self


def _extension(given: Any) -> str:
    keys = given if isinstance(given, dict) else type(given).model_fields
    if "rope_type" in keys:
        return "linear"
    return "llama3" if "low_freq_factor" in keys else "yarn"


RopeScaling = Annotated[
    Annotated[YarnConfig, Tag("yarn")]
    | Annotated[Llama3Config, Tag("llama3")]
    | Annotated[LinearConfig, Tag("linear")],
    Discriminator(_extension),
]
"""Any rotary extension that is computed here."""


def _tokens(given: Any) -> Any:
    """One token as itself, several as a tuple without repeats, an empty list as None."""
    ids = given if isinstance(given, list | tuple) else [given]
    if given is not None and not all(type(token) is int for token in ids):
        raise ValueError(f"found {given!r:.80}; expected a token or a list of tokens")
    ids = tuple(dict.fromkeys(ids))
    return ids if len(ids) > 1 else next(iter(ids), None)


StopTokens = Annotated[int | tuple[int, ...] | None, BeforeValidator(_tokens)]


class _Architecture(Section):
    """What all families have."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Annotated[Size, Field(le=MAX_LAYERS)]
    max_position_embeddings: Size
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.006, gt=0)
    embedding_initializer_range: float | None = Field(None, gt=0)
    """Of the token embedding; None: like all the rest, as DeepSeek trains. A model that sees few
    tokens learns faster when they are not small beside what attention adds to them."""

    num_attention_heads: Size
    intermediate_size: Size
    rope_theta: float = Field(10000.0, gt=1)
    rope_scaling: RopeScaling | None = None

    bos_token_id: int | None = Field(None, strict=True)
    eos_token_id: StopTokens = None
    """What ends an answer. Instruction-tuned models name several, each of which does."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer."""
        eos = self.eos_token_id
        return eos if isinstance(eos, tuple) else () if eos is None else (eos,)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for wrong, message in self._problems():
            if wrong:
                raise ValueError(message)
        return self

    def _problems(self) -> Iterator[tuple[bool, str]]:
        """Every combination that cannot work: whether it is there, and what to say of it."""
        named = [("eos_token_id", token) for token in self.eos_token_ids]
        named += [] if self.bos_token_id is None else [("bos_token_id", self.bos_token_id)]
        for name, token in named:
            outside = not 0 <= token < self.vocab_size
            yield outside, f"{name}={token} is outside vocab_size={self.vocab_size}"
        count = len(self.eos_token_ids)
        yield (
            count > MAX_EOS_TOKENS,
            f"eos_token_id names {count} tokens, at most {MAX_EOS_TOKENS} are used",
        )


class DeepSeekConfig(_Architecture):
    """DeepSeek-V3 and its kin: multi-head latent attention, many small experts, MTP.

    DeepSeek-V3 (arXiv:2412.19437) section 4.2 gives the values of the 671B model.
    `num_experts_per_tok` is K, `n_routed_experts` N_r, `n_shared_experts` N_s,
    `q_lora_rank` d'_c, `kv_lora_rank` d_c, `qk_rope_head_dim` d_h^R of the paper.
    """

    model_type: Literal["deepseek_v3", "deepseek_v2", "kimi_k2"] = "deepseek_v3"

    q_lora_rank: Size | None = None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size

    first_k_dense_replace: SizeOrZero = 0
    moe_intermediate_size: Size
    n_routed_experts: Size
    n_shared_experts: SizeOrZero = 0
    num_experts_per_tok: Size
    n_group: Size = 1
    topk_group: Size = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: Annotated[SizeOrZero, Field(le=MAX_LAYERS)] = 0

    def _problems(self) -> Iterator[tuple[bool, str]]:
        yield from super()._problems()
        c = self
        yield (
            c.qk_rope_head_dim % 2 != 0,
            f"qk_rope_head_dim={c.qk_rope_head_dim} is odd, but rotary pairs need an even number; "
            f"choose {c.qk_rope_head_dim + 1}",
        )
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        yield (
            layers * c.n_routed_experts > MAX_EXPERTS,
            f"n_routed_experts={c.n_routed_experts} in {layers} layers are more than the "
            f"{MAX_EXPERTS} experts that a model can have here; is one a mistake?",
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

    @property
    def rotary_dim(self) -> int:
        """Width of what is rotated: the decoupled part of a head."""
        return self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a layer remembers of a token: c_kv and k_rope."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def tie_word_embeddings(self) -> bool:
        """No released model of these families reads its logits off the embedding."""
        return False


class DenseConfig(_Architecture):
    """Llama, Qwen2 and Qwen3: grouped-query attention and a dense feed-forward in every layer.

    R1's distills are of these families. What MLA and experts need is not there, and so the model
    has `num_hidden_layers` dense layers and no others.
    """

    model_type: Literal["llama", "qwen2", "qwen3"]

    num_key_value_heads: Size
    head_dim: Size
    tie_word_embeddings: bool = False
    """Whether logits are read off the embedding; the model then has no head of its own."""

    def _problems(self) -> Iterator[tuple[bool, str]]:
        yield from super()._problems()
        yield (
            self.head_dim % 2 != 0,
            f"head_dim={self.head_dim} is odd, but rotary pairs need an even number; "
            f"choose {self.head_dim + 1}",
        )
        yield (
            self.num_attention_heads % self.num_key_value_heads != 0,
            f"num_attention_heads={self.num_attention_heads} do not share "
            f"num_key_value_heads={self.num_key_value_heads} evenly; choose a divisor",
        )
        if isinstance(yarn := self.rope_scaling, YarnConfig):
            both = bool(yarn.mscale and yarn.mscale_all_dim)
            yield (
                not both and (yarn.mscale, yarn.mscale_all_dim) != (1, 0),
                "rope_scaling.mscale and mscale_all_dim count only together in this family; give "
                "both above zero, or attention_factor",
            )

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias: Qwen2's."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key are normalized: Qwen3's."""
        return self.model_type == "qwen3"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Width of what is rotated: the whole head."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a layer remembers of a token: keys and values of the heads that share."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def first_k_dense_replace(self) -> int:
        """Dense layers: all of them."""
        return self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts: none."""
        return 0

    @property
    def n_routed_experts(self) -> int:
        """Experts: none."""
        return 0

    @property
    def num_nextn_predict_layers(self) -> int:
        """MTP layers: none."""
        return 0


ModelConfig = DeepSeekConfig | DenseConfig
"""Any family's architecture."""

FAMILIES: dict[str, type[DeepSeekConfig] | type[DenseConfig]] = {
    family: kind
    for kind in (DeepSeekConfig, DenseConfig)
    for family in get_args(kind.model_fields["model_type"].annotation)
}
"""What each `model_type` is."""
