"""Configuration of a plan for the engine: which of its steps, and with how much room."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from dsjax.architecture import Section


class ServingConfig(Section):
    """What `dsjax plan` takes for a step of the engine that serve.py and eval run."""

    task: Literal["serve"]
    model: str
    """A name under configs/model/, or a path."""
    step: Literal["prefill", "decode"] = "decode"
    """A part of a prompt in every part of the batch is read, or every row is continued."""
    rows: PositiveInt = 128
    """Sequences that run at the same time."""
    context: PositiveInt = 4096
    """Tokens of each, all of them in the cache."""
    drafts: NonNegativeInt = 0
    """Tokens that MTP drafts a step."""
    dtype: Literal["bfloat16", "fp8"] = "bfloat16"
    """What weights are held in; fp8 is as DeepSeek releases them, computed with in bfloat16."""
    mesh: dict[str, PositiveInt] | None = None
    """Sizes of mesh axes; None: all devices on `expert`."""
