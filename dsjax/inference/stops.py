"""Which tokens end an answer beside the model's eos, as a checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.errors import UserError
from dsjax.inference.request import MAX_STOP_TOKENS
from dsjax.small_files import read_json_if_there


def read_stop_tokens(home: Path | None, vocab_size: int) -> tuple[int, ...]:
    """What generation_config.json in a language's folder says that answers end with.

    Raises:
        UserError: it is no token of the model, or they are too many.
    """
    if home is None:
        return ()
    named: Any = read_json_if_there(home / "generation_config.json").get("eos_token_id", [])
    ids = named if isinstance(named, list) else [named]
    known = [i for i in ids if type(i) is int and 0 <= i < vocab_size]
    if len(known) < len(ids) or len(known) > MAX_STOP_TOKENS:
        raise UserError(
            f"{home / 'generation_config.json'}: eos_token_id is {named!r}; expected a token or at "
            f"most {MAX_STOP_TOKENS}, each below vocab_size={vocab_size}"
        )
    return tuple(known)
