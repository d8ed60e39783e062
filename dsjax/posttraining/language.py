"""The language of a checkpoint goes with whatever is trained from it."""

from __future__ import annotations

from pathlib import Path

from dsjax.checkpoint.source import carried_files
from dsjax.data.language import Language
from dsjax.small_files import write_whole

TEMPLATE = "chat_template.jinja"


def write_language(language: Language, folder: Path, template: str | None = None) -> None:
    """Write a tokenizer's files as they came, with another chat template if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if language.home is None:
        language.tokenizer.save(folder)
    else:
        for name, file in carried_files(language.home).items():
            if name != "config.json":  # the run's own configuration says what the model is
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, file.read_bytes())
    if template is not None:
        write_whole(folder / TEMPLATE, template.encode())
