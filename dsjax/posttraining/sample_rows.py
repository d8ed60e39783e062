"""A prompt, an answer to it, and kept ones as data that `task: sft` reads, with provenance."""

from __future__ import annotations

import dataclasses
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
from dsjax.rewards.answer import Answer
from dsjax.small_files import read_small


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt."""

    number: int
    """Among all of its files, from 0 on."""
    example: Mapping[str, Any]
    """Its line."""
    said: str | list[dict[str, Any]]
    """A text, in the template, or messages."""
    tokens: tuple[int, ...]
    prompt: str
    """The text of the tokens."""

    @property
    def digest(self) -> str:
        """Of all that the question is."""
        written = repr((self.said, self.example)).encode("utf-8", "backslashreplace")
        return hashlib.blake2b(written, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One answer to it."""

    asked: Asked
    sample: int
    """From 0 on."""
    seed: int
    record: Mapping[str, Any]
    """`text`, think tags spelled out; `tokens`, their number; `finish`."""
    score: Mapping[str, Any]
    """`total`, `values` and `reasons` of `dsjax.rewards.score.Score`; empty before there is one."""

    @property
    def answer(self) -> Answer:
        """As rewards and filters look at it."""
        text, tokens, finish = (self.record[name] for name in ("text", "tokens", "finish"))
        return Answer(self.asked.prompt, text, tokens, finish == "length", self.asked.example)

    @property
    def is_right(self) -> bool:
        """Whether the first reward says so."""
        return next(iter(self.score["values"].values())) >= 1


def data_row(drawn: Drawn, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt and answer as one record, with what `origin` and the answer say of its provenance.

    Messages become `messages`, the answer behind them, its thought as `reasoning_content`; answers
    that the prompt came with are not trained. A text becomes `prompt` and `completion`, as they
    were read and written.
    """
    asked, text = drawn.asked, drawn.record["text"]
    row: dict[str, Any]
    if isinstance(asked.said, str):
        row = {"prompt": asked.said, "completion": text}
    else:
        thought, content = split_thought(asked.prompt, text)
        answer = {"role": "assistant", "content": content or ""}
        if thought:
            answer["reasoning_content"] = thought
        row = {"messages": [*map(_untrained, asked.said), answer]}
    which = {"prompt": asked.number, "prompt_digest": asked.digest, "sample": drawn.sample}
    how = {"seed": drawn.seed, "rewards": drawn.score["values"]}
    return {**row, "provenance": {**origin, **which, **how}}


def _untrained(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"trained": False} if message["role"] == "assistant" else message


def origin_of(config: SampleConfig, checkpoint: Path, stamp: str) -> dict[str, Any]:
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
