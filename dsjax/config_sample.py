"""Configuration of rejection sampling (`dsjax sample`); docs/r1.md tells what it is for."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveInt, Tag, field_validator

from dsjax.architecture import Section
from dsjax.config_grpo import PromptsConfig, SamplingConfig
from dsjax.config_rewards import LANGUAGES, RewardConfig, check_name, name_of, names_in


class RepeatedSamplingConfig(SamplingConfig):
    """How answers are drawn, and how many."""

    k: int = Field(gt=0)
    """Answers to each prompt."""


class FinishedFilter(Section):
    """Keeps answers that ended by themselves, thought and all."""

    name: Literal["finished"] = "finished"


class CorrectFilter(Section):
    """Keeps answers of which the first reward says 1."""

    name: Literal["correct"] = "correct"


class LanguageFilter(Section):
    """Keeps answers in one language, told by its script as the reward `language` does."""

    name: Literal["language"] = "language"
    language: str | None = None
    """Of lines that have no `language` of their own; None: whichever an answer is in."""
    share: float = Field(default=0.9, gt=0, le=1)
    """Of the words, at least."""

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in LANGUAGES:
            raise ValueError(f"unknown language {value!r}; expected one of {', '.join(LANGUAGES)}")
        return value


class ReadableFilter(Section):
    """Keeps answers that read well; dsjax/posttraining/sample_filters.py has the rules."""

    name: Literal["readable"] = "readable"
    longest_paragraph: int = Field(default=2000, gt=0)
    """Characters without a blank line."""


class DistinctFilter(Section):
    """Keeps the first of answers to one prompt that are the same but for case and blanks."""

    name: Literal["distinct"] = "distinct"


FilterConfig = Annotated[
    Annotated[FinishedFilter, Tag("finished")]
    | Annotated[CorrectFilter, Tag("correct")]
    | Annotated[LanguageFilter, Tag("language")]
    | Annotated[ReadableFilter, Tag("readable")]
    | Annotated[DistinctFilter, Tag("distinct")],
    Discriminator(name_of),
    BeforeValidator(lambda value: check_name(value, "filter", FILTERS)),
]
"""Any one of them."""

FILTERS = names_in(FilterConfig)
"""What `name` may be."""


def _all_filters() -> list[FilterConfig]:
    return [FinishedFilter(), CorrectFilter(), LanguageFilter(), ReadableFilter(), DistinctFilter()]


class SampleConfig(Section):
    """Several answers to each prompt, of which the good ones become data."""

    checkpoint: str = Field(min_length=1)
    """A run of train.py, dsjax weights, or a Hugging Face folder."""
    output: str = Field(min_length=1)
    """The folder that is written."""
    prompts: PromptsConfig
    limit: int | None = Field(default=None, gt=0)
    """So many of the prompts, chosen by `seed`; None: all that are not held out."""
    rewards: list[RewardConfig] = Field(min_length=1)
    """The first decides what is correct."""
    sampling: RepeatedSamplingConfig
    filters: list[FilterConfig] = Field(default_factory=_all_filters)
    """In this order; an answer is refused by the first that does. An empty list keeps all."""
    keep_per_prompt: int | None = Field(default=None, gt=0)
    """Of what the filters leave, chosen by `seed`; None: all."""
    seed: int = Field(default=0, ge=0)
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the model computes in; None: as stored."""
    mesh: dict[str, PositiveInt] | None = None
    """Sizes of mesh axes over all devices; None: one device."""

    @field_validator("filters")
    @classmethod
    def _once(cls, value: list[FilterConfig]) -> list[FilterConfig]:
        names = Counter(each.name for each in value)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"the filter {twice[0]!r} stands twice; give it once")
        return value
