"""What an evaluation reads of a checkpoint before any weight: its language and its limits.

Imports no jax: what is wrong with a task or its length is said at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.source import read_folder_config
from dsjax.data.language import Language, check_vocabulary, read_language
from dsjax.inference.stops import read_stop_tokens


@dataclasses.dataclass(frozen=True)
class Reader(Language):
    """A checkpoint's language, and what else an evaluation has to know of it."""

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
