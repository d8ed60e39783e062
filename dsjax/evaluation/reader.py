"""What an evaluation reads of a checkpoint before any weight: its tokenizer, template and limits.

Imports no jax: what is wrong with a task or its length is said at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.source import read_folder_config
from dsjax.data.chat_template import ChatTemplate, TemplateError, read_chat_template
from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from dsjax.errors import UserError
from dsjax.inference.request import MAX_STOP_TOKENS
from dsjax.rewards.answer import CLOSED, OPENED
from dsjax.small_files import read_json_if_there


@dataclasses.dataclass(frozen=True)
class Reader:
    """Text to tokens and back, as one checkpoint does it."""

    checkpoint: Path
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    add_bos: bool
    """Whether a text that is no chat begins with bos."""
    stop_tokens: tuple[int, ...]
    """What ends an answer beside the model's eos, by generation_config.json."""

    def ask(self, message: str) -> list[int]:
        """The prompt of one user's message; of a model without a chat template, the text itself.

        Raises:
            UserError: the template does not take it.
        """
        if self.template is None:
            return self.text(message)
        try:
            return self.template.encode([{"role": "user", "content": message}])
        except TemplateError as error:
            raise UserError(f"{self.checkpoint}: {error}") from None

    def text(self, text: str) -> list[int]:
        """The tokens of a text, in which a special token's spelling is that token."""
        tokens = encode_with_added_tokens(self.tokenizer, text)
        bos = self.tokenizer.bos_id
        if self.add_bos and bos is not None and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, think tags spelled out and other special tokens left out."""
        tags = {self.tokenizer.added_tokens.get(tag) for tag in (OPENED, CLOSED)}
        hidden = self.tokenizer.special_ids - tags
        return self.tokenizer.decode([token for token in tokens if token not in hidden])


def read_checkpoint(checkpoint: Path) -> Reader:
    """Read what lies beside the weights of a released folder, a run or dsjax weights.

    Raises:
        UserError: a file is missing, damaged, or holds what cannot be used.
    """
    config = read_folder_config(checkpoint)
    home = find_tokenizer(checkpoint).parent
    tokenizer = load_tokenizer(home)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} tokens, the model's "
            f"vocab_size is {config.vocab_size}; they do not belong together"
        )
    written = read_json_if_there(home / "tokenizer_config.json")
    return Reader(
        checkpoint=checkpoint,
        config=config,
        tokenizer=tokenizer,
        template=read_chat_template(home, tokenizer),
        add_bos=written.get("add_bos_token") is not False,
        stop_tokens=_stop_tokens(home, config.vocab_size),
    )


def _stop_tokens(home: Path, vocab_size: int) -> tuple[int, ...]:
    named: Any = read_json_if_there(home / "generation_config.json").get("eos_token_id", [])
    ids = named if isinstance(named, list) else [named]
    known = [i for i in ids if type(i) is int and 0 <= i < vocab_size]
    if len(known) < len(ids) or len(known) > MAX_STOP_TOKENS:
        raise UserError(
            f"{home / 'generation_config.json'}: eos_token_id is {named!r}; expected a token or at "
            f"most {MAX_STOP_TOKENS}, each below vocab_size={vocab_size}"
        )
    return tuple(known)
