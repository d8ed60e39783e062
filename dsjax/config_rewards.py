"""Configuration of rewards: a list, each item told apart by its `name`; see docs/rewards.md."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator

from dsjax.architecture import Section

LANGUAGES: dict[str, tuple[str, ...]] = {
    "ar": ("ARABIC",),
    "bn": ("BENGALI",),
    "bg": ("CYRILLIC",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fa": ("ARABIC",),
    "fr": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "it": ("LATIN",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "pt": ("LATIN",),
    "ru": ("CYRILLIC",),
    "ta": ("TAMIL",),
    "th": ("THAI",),
    "tr": ("LATIN",),
    "uk": ("CYRILLIC",),
    "vi": ("LATIN",),
    "zh": ("CJK",),
}
"""The scripts that each language is written in, as Unicode's names of characters begin."""


class BaseReward(Section):
    """What every reward has: how much its value counts in the sum."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Keys that a line of the prompt file must have."""
    weight: float = 1.0


class MathReward(BaseReward):
    """1 where the final answer means what the line's `answer` does, else 0."""

    needs = ("answer",)
    name: Literal["math"] = "math"
    seconds: int = Field(5, gt=0)
    """Of the processor, for one comparison."""
    memory_bytes: int = Field(1 << 30, gt=0)


class ExactReward(BaseReward):
    """1 where the answer is the line's `answer`, blanks at both ends aside, else 0."""

    needs = ("answer",)
    name: Literal["exact"] = "exact"


class ChoiceReward(BaseReward):
    """1 where the letter that the final answer chooses is the line's `answer`, else 0."""

    needs = ("answer", "choices")
    name: Literal["choice"] = "choice"


class CodeReward(BaseReward):
    """1 where the answer's program passes all of the line's `tests`, else 0."""

    needs = ("tests",)
    name: Literal["code"] = "code"
    seconds: int = Field(10, gt=0)
    """Of the processor, for one test of input and output, or for all assertions together."""
    memory_bytes: int = Field(1 << 30, gt=0)


class FormatReward(BaseReward):
    """1 where thought and answer stand in their tags, each once and in order, else 0."""

    name: Literal["format"] = "format"
    answer_tags: bool = False
    """Also <answer> and </answer>, around all that follows the thought, as R1-Zero has it."""


class LanguageReward(BaseReward):
    """The share of words in the target language (DeepSeek-R1, arXiv:2501.12948, section 2.3.2)."""

    name: Literal["language"] = "language"
    language: str | None = None
    """Of lines that have no `language` of their own."""

    @field_validator("language")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in LANGUAGES:
            raise ValueError(f"unknown language {value!r}; expected one of {', '.join(LANGUAGES)}")
        return value


class LengthReward(BaseReward):
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): 0 down to -1."""

    name: Literal["length"] = "length"
    limit: int = Field(gt=0)
    """Tokens from which on an answer is worth -1."""
    margin: int = Field(gt=0)
    """Tokens before the limit in which it falls from 0."""

    @field_validator("margin")
    @classmethod
    def _inside(cls, value: int, info: Any) -> int:
        if value > (limit := info.data.get("limit", value)):
            raise ValueError(f"margin={value} is more than limit={limit}; choose a smaller one")
        return value


class ModelReward(BaseReward):
    """What a reward model says: one number for the prompt and its answer."""

    name: Literal["model"] = "model"
    checkpoint: str
    """A folder that `dsjax.load` reads, and in it reward_head.safetensors."""
    batch_size: int = Field(8, gt=0)


class PythonReward(BaseReward):
    """What a function in the user's own file says."""

    name: Literal["python"] = "python"
    path: str
    function: str = "reward"
    network: bool = False
    """Whether it may speak to other machines, for instance to ask a model there."""
    seconds: int = Field(60, gt=0)
    """Of the processor, for all answers of one call."""
    memory_bytes: int = Field(4 << 30, gt=0)


def name_of(value: Any) -> Any:
    """The `name` by which an item of a list says what it is."""
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


def names_in(union: Any) -> tuple[str, ...]:
    """What `name` may be in an annotated union of tagged sections."""
    kinds = get_args(get_args(union)[0])
    marks = (mark for kind in kinds for mark in kind.__metadata__)
    return tuple(mark.tag for mark in marks if isinstance(mark, Tag))


def check_name(value: Any, what: str, names: tuple[str, ...]) -> Any:
    """The item, if it is one of those that there are; else `ValueError`."""
    if not isinstance(value, dict | Section):
        raise ValueError(f"a {what} is a mapping such as {{name: {names[0]}}}, not {value!r}")
    if (name := name_of(value)) not in names:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(names)}")
    return value


RewardConfig = Annotated[
    Annotated[MathReward, Tag("math")]
    | Annotated[ExactReward, Tag("exact")]
    | Annotated[ChoiceReward, Tag("choice")]
    | Annotated[CodeReward, Tag("code")]
    | Annotated[FormatReward, Tag("format")]
    | Annotated[LanguageReward, Tag("language")]
    | Annotated[LengthReward, Tag("length")]
    | Annotated[ModelReward, Tag("model")]
    | Annotated[PythonReward, Tag("python")],
    Discriminator(name_of),
    BeforeValidator(lambda value: check_name(value, "reward", NAMES)),
]
"""Any one of them."""

NAMES = names_in(RewardConfig)
"""What `name` may be."""
