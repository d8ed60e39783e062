"""What goes into the engine and what comes out of it: plain host values.

The doors (batch files, HTTP, chat, `dsjax.generate`, rollouts) speak to the engine in these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from dsjax.errors import UserError

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKENS = 16
LARGEST_SEED = 2**32 - 1

FinishReason = Literal["stop", "length"]
"""`stop`: a stop token came, and is the last token; `length`: max_tokens or the context is full."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is continued.

    Logits are changed in this order: logit_bias, the three penalties, temperature, then top_k,
    top_p and min_p, each over what the one before left. Log-probabilities are those of the model
    itself, before any of this.

    Raises:
        UserError: a value outside its range; the message names it.
    """

    max_tokens: int
    min_tokens: int = 0
    """Stop tokens cannot be chosen before so many tokens are made."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities together reach this."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt or output are divided, negative ones multiplied by it."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that it is in the output."""
    presence_penalty: float = 0.0
    """Taken from a token's logit if it is in the output."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    stop_tokens: tuple[int, ...] = ()
    """Beside the model's eos."""
    ignore_eos: bool = False
    seed: int = 0
    """The same seed, prompt and parameters give the same tokens, whatever runs beside them."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token, by the model and as it was drawn, and of so many
    likeliest ones; None: not needed."""
    prompt_logprobs: int | None = None
    """The same of the prompt's own tokens."""

    def __post_init__(self) -> None:
        ranges = (
            ("max_tokens", self.max_tokens, 1, math.inf),
            ("min_tokens", self.min_tokens, 0, self.max_tokens),
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 0, math.inf),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100),
            ("frequency_penalty", self.frequency_penalty, -2, 2),
            ("presence_penalty", self.presence_penalty, -2, 2),
            ("seed", self.seed, 0, LARGEST_SEED),
            ("logprobs", self.logprobs or 0, 0, MAX_TOP_LOGPROBS),
            ("prompt_logprobs", self.prompt_logprobs or 0, 0, MAX_TOP_LOGPROBS),
            ("the number of entries of logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS),
            ("the number of stop_tokens", len(self.stop_tokens), 0, MAX_STOP_TOKENS),
            *((f"logit_bias[{token}]", v, -100, 100) for token, v in self.logit_bias.items()),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:  # NaN is within nothing
                raise UserError(f"{name} is {value}; expected {low} to {high}")
        if self.top_p == 0:
            raise UserError("top_p is 0, which leaves no token; expected more, up to 1")


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    id: str
    tokens: tuple[int, ...]
    """The prompt, not empty."""
    sampling: SamplingParams


class TokenLogprob(NamedTuple):
    """A token's log-probability, and those of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """What one step of the engine added to one request."""

    request_id: str
    tokens: tuple[int, ...]
    """New tokens in order; one that stopped the request is the last of them."""
    finish: FinishReason | None = None
    """Set in a request's last update."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each new token, if asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """One for each token of the prompt, the first None; in the first update, if asked for."""
    drawn_logprobs: tuple[float, ...] = ()
    """Those of the new tokens in the distribution that they were drawn from: after penalties,
    temperature and what top_k, top_p and min_p left. If log-probabilities were asked for."""
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache; in the first update."""
    experts: Int[np.ndarray, "N L K"] | None = None
    """Which experts each expert layer sent each token to, prompt and output but for the last token,
    which was never read. In the last update, if the engine's settings ask for it."""
