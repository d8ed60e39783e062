"""What is read of a checkpoint before any weight: its language and its limits.

Imports no jax: what is wrong with a prompt or its length is said at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.source import read_folder_config
from dsjax.data.language import Language, check_vocabulary, read_language
from dsjax.inference.stops import read_stop_tokens


@dataclasses.dataclass(frozen=True)
class Reader(Language):
    """A checkpoint's language, and what else who asks it has to know."""

    checkpoint: Path
    config: ModelConfig
    stop_tokens: tuple[int, ...]
    """What ends an answer beside the model's eos, by generation_config.json."""

    def ask(self, message: str) -> list[int]:
        """The prompt of one user's message; of a model without a chat template, the text itself.

        Raises:
            UserError: the template does not take it.
        """
        if self.template is None:
            return self.text(message)
        return self.chat([{"role": "user", "content": message}])


def read_checkpoint(checkpoint: Path) -> Reader:
    """Read what lies beside the weights of a released folder, a run or dsjax weights.

    Raises:
        UserError: a file is missing, damaged, or holds what cannot be used.
    """
    config = read_folder_config(checkpoint)
    language = read_language(checkpoint)
    check_vocabulary(language.tokenizer, config.vocab_size, checkpoint)
    return Reader(
        **vars(language),
        checkpoint=checkpoint,
        config=config,
        stop_tokens=read_stop_tokens(language.home, config.vocab_size),
    )


def weights_stamp(checkpoint: Path) -> str:
    """What tells these weights from others at the same path, such as a later step of a run.

    Of names, sizes and times of files: hundreds of gigabytes are not read for it.
    """
    run = checkpoint / "checkpoints"
    files = (file for file in (run if run.is_dir() else checkpoint).rglob("*") if file.is_file())
    found = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.blake2b(repr(found).encode(), digest_size=8).hexdigest()
