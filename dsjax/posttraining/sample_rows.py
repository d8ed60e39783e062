"""Kept answers as data that `task: sft` reads, each with its provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsjax.checkpoint.manifest import MANIFEST
from dsjax.checkpoint.run_weights import newest_step
from dsjax.checkpoint.source import RUN, kind_of
from dsjax.config_sample import SampleConfig
from dsjax.data.thinking import split_thought
from dsjax.small_files import read_small


def data_row(said: str | list[dict[str, Any]], prompt: str, text: str) -> dict[str, Any]:
    """Question and answer as one record.

    Messages become `messages`, the answer behind them, its thought as `reasoning_content`; answers
    that the question came with are not trained. A text becomes `prompt` and `completion`, as they
    were read and written.

    Args:
        said: what was asked.
        prompt: the same as the model read it.
        text: what it wrote, think tags spelled out.
    """
    if isinstance(said, str):
        return {"prompt": said, "completion": text}
    thought, content = split_thought(prompt, text)
    answer = {"role": "assistant", "content": content}
    if thought:
        answer["reasoning_content"] = thought
    earlier = [one | {"trained": False} if one["role"] == "assistant" else one for one in said]
    return {"messages": [*earlier, answer]}


def origin(config: SampleConfig, checkpoint: Path, stamp: str) -> dict[str, Any]:
    """What the provenance of every row says alike: whose answers these are, and how drawn.

    `manifest` is the SHA-256 of the file that has the digests of all others, where dsjax wrote the
    weights; without one, `weights` tells them from others at the same path.

    Raises:
        UserError: a run has no sound checkpoint.
    """
    home = newest_step(checkpoint, check=False)[0] if kind_of(checkpoint) == RUN else checkpoint
    manifest = home / MANIFEST
    digest = hashlib.sha256(read_small(manifest)).hexdigest() if manifest.is_file() else None
    return {
        "checkpoint": config.checkpoint,
        "step": int(home.name) if home != checkpoint else None,
        "manifest": digest,
        "weights": stamp,
        "prompts": config.prompts.path,
        "sampling": config.sampling.model_dump(exclude={"k", "rows"}),
        "dsjax": version("dsjax"),
    }


def digest_of(said: str | list[dict[str, Any]], example: Mapping[str, Any]) -> str:
    """Of all that a question is."""
    return hashlib.blake2b(repr((said, example)).encode(), digest_size=8).hexdigest()
