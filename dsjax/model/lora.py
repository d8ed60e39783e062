"""Low-rank adapters on a model whose own weights are frozen (LoRA, arXiv:2106.09685).

What has an adapter is a linear layer of attention, of a dense feed-forward or of shared experts.
Routed experts have none: their weights are one array that tokens are sorted for. What is trained
are the adapters alone, since they are all that is left of `nnx.Param`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any, cast

import jax
from flax import nnx
from jaxtyping import Array

from dsjax.model.layers import Adapter, Frozen
from dsjax.model.transformer import Transformer


def add_adapters(
    model: Transformer, paths: Iterable[str], key: Array, *, rank: int, alpha: float
) -> Transformer:
    """Freeze every weight, and put an adapter beside each linear layer at `paths`.

    For use within a trace, `jax.jit` or `jax.eval_shape`: it changes what it is given.

    Args:
        model: with its layers in stacks; an adapter's A and B are stacked alike.
        paths: of `Linear` modules, dotted, such as `dense_layers.attn.q_a`.
        key: for A. Each path draws of its own, whatever the other paths are.
    """
    for _, module in nnx.iter_modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, Frozen(value[...], **value.get_metadata()))
    for path in paths:
        linear: Any = reduce(getattr, path.split("."), cast(Any, model))
        of_path = jax.random.fold_in(key, _number_of(path))
        linear.adapter = Adapter(of_path, linear, rank, alpha)
    return model


def _number_of(path: str) -> int:
    """The same number for the same path, in every process."""
    return int.from_bytes(path.encode(), "big") % (2**31 - 1)
