"""Whatever holds a model, seen one way: its tensors under their released names. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import Tensor, match, without_absent_mtp
from dsjax.checkpoint.hf_config import read_config
from dsjax.checkpoint.safetensors import read_folder
from dsjax.checkpoint.weights_folder import CONFIG, RELEASED, TOKENIZER, WEIGHTS, read_weights
from dsjax.config_files import load_model_config, load_run_config
from dsjax.errors import UserError

RUN = "a run"
DSJAX = "dsjax weights"
HUGGING_FACE = "a Hugging Face folder"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_NOT_CARRIED = {"manifest.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"}


class Stored(Protocol):
    """A tensor where it is stored."""

    @property
    def file(self) -> Path:
        """Where, for messages."""
        ...

    @property
    def dtype(self) -> str:
        """By the name that safetensors has for it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the released files."""
        ...

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        ...

    def read(self) -> np.ndarray:
        """All of it."""
        ...

    def read_flat(self, begin: int, end: int) -> np.ndarray:
        """Some of its numbers, in the file's order."""
        ...


@dataclass(frozen=True)
class Source:
    """A model on disk. `promised` is its configuration, `config` that of what is really there."""

    folder: Path
    kind: str
    promised: ModelConfig
    config: ModelConfig
    stored: Mapping[str, Stored]
    parts: list[Tensor]
    carried: dict[str, Path]
    """Files that are no weights, by the names they have in a released folder."""


def kind_of(folder: Path) -> str:
    """What a folder is.

    Raises:
        UserError: nothing that holds a model.
    """
    if (folder / "checkpoints").is_dir():
        return RUN
    if (folder / WEIGHTS).is_dir() and (folder / CONFIG).is_file():
        return DSJAX
    if (folder / "config.json").is_file():
        return HUGGING_FACE
    found = (
        "a folder without config.json, weights/ or checkpoints/"
        if folder.is_dir()
        else "no such folder"
    )
    raise UserError(
        f"{folder}: {found}; expected a Hugging Face folder, dsjax weights or a run directory"
    )


def read_folder_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder, before any weight is looked at."""
    kind = kind_of(folder)
    if kind == RUN:
        return load_run_config(folder / CONFIG).model
    return load_model_config(folder / CONFIG) if kind == DSJAX else read_config(folder)


def open_source(folder: Path) -> Source:
    """Read the headers of a model's files, and account for every tensor.

    Raises:
        UserError: a file is damaged, or the tensors are not those of the configuration.
    """
    kind, promised = kind_of(folder), read_folder_config(folder)
    stored: Mapping[str, Stored]
    if kind == RUN:
        from dsjax.checkpoint.run_weights import read_run

        stored = read_run(folder, promised)
    else:
        stored = read_weights(folder, promised) if kind == DSJAX else read_folder(folder)
    config = without_absent_mtp(promised, stored)
    parts = match(config, stored, folder)
    homes = [folder] if kind == HUGGING_FACE else [folder / TOKENIZER, folder / RELEASED]
    carried = {name: file for home in homes for name, file in _carried(home).items()}
    return Source(folder, kind, promised, config, stored, parts, carried)


def _carried(home: Path) -> dict[str, Path]:
    """What travels along: all files but weights, hidden ones, and those about weights."""
    if not home.is_dir():
        return {}
    files = [*home.iterdir(), *(home / "additional_chat_templates").glob("*.jinja")]
    return {
        file.relative_to(home).as_posix(): file
        for file in sorted(files)
        if file.is_file()
        and file.suffix not in _WEIGHT_SUFFIXES
        and file.name not in _NOT_CARRIED
        and not file.name.startswith(".")
    }
