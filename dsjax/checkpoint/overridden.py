"""Settings of a model that differ from its checkpoint's, and may. Imports no jax."""

from __future__ import annotations

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import tensors
from dsjax.errors import UserError


def differences(config: ModelConfig, found: ModelConfig, where: str) -> list[str]:
    """What `config` says otherwise than the checkpoint `found`, key by key.

    Whatever leaves every tensor its shape may differ: the end token, the rotary settings, how many
    experts a token has.

    Args:
        config: the model that is wanted.
        found: the checkpoint's.
        where: the checkpoint, for the message.

    Raises:
        UserError: the family differs, or a setting that tensors depend on; it names the first.
    """
    wanted, there = config.model_dump(), found.model_dump()
    changed = [key for key in ("model_type", *wanted) if wanted[key] != there.get(key)]
    for key in changed:
        alone = found.model_copy(update={key: wanted[key]})
        if key == "model_type" or _shapes(alone) != _shapes(found):
            raise UserError(
                f"model.{key}={wanted[key]!r}, but {where} has {there.get(key)!r}, and tensors of "
                "its shape; leave the setting out, or choose another checkpoint"
            )
    return [f"model.{key}={wanted[key]!r} instead of {there.get(key)!r}" for key in changed]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors(config)}
