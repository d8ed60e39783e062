"""What lies beside a checkpoint's weights: how text becomes tokens there, and tokens text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.data.chat_template import ChatTemplate, TemplateError, read_chat_template
from dsjax.data.text import encode_with_added_tokens
from dsjax.data.thinking import CLOSED, OPENED
from dsjax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from dsjax.data.tokenizer_files import CONFIG, SAVED_BEFORE
from dsjax.errors import UserError
from dsjax.small_files import read_json_if_there


@dataclasses.dataclass(frozen=True)
class Language:
    """Text to tokens and back, as one checkpoint does it."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    add_bos: bool
    """Whether a text that is no chat begins with bos."""
    home: Path | None
    """The folder that it was read from; None where it comes from none."""

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt that messages make.

        Raises:
            UserError: there is no template, or it does not take them.
        """
        if self.template is None:
            raise UserError("a prompt is messages, and the checkpoint has no chat template")
        try:
            return self.template.encode(messages)
        except TemplateError as error:
            raise UserError(f"{self.home}: {error}") from None

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


def read_language(folder: str | Path) -> Language:
    """Read it from a released folder, a run or dsjax weights. Imports no jax.

    Raises:
        UserError: a file is missing, damaged, or holds what cannot be used.
    """
    home = find_tokenizer(folder).parent
    tokenizer = load_tokenizer(home)
    template = read_chat_template(home, tokenizer)
    return Language(tokenizer, template, _adds_bos(tokenizer, home), home)


def _adds_bos(tokenizer: Tokenizer, home: Path) -> bool:
    """Whether a text that is no chat begins with bos.

    As in transformers, the post-processor of tokenizer.json decides. DeepSeek's has none and its
    tokenizer_config.json says `add_bos_token`, which transformers 4 obeyed and 5 ignores: here it
    counts, as in DeepSeek's own code.
    """
    written = read_json_if_there(home / CONFIG)
    asked = written.get("add_bos_token", written.keys() == SAVED_BEFORE)
    return tokenizer.bos_id is not None and (tokenizer.writes_bos or asked is True)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, name: str | Path) -> None:
    """A model has at least as many tokens as its tokenizer; `name` says whose they are.

    Raises:
        UserError: it has fewer.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
            f"{vocab_size}; they do not belong together"
        )
