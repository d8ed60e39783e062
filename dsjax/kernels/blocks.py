"""How a CPU walks rows that are sorted by expert: expert after expert, in blocks of falling size.

A product of many rows is fast, one of few wastes little where an expert's rows end; so an expert's
rows go in large blocks first and in small ones last. Blocks know nothing of each other: an expert's
last one can run over into the next expert's rows, which come later and overwrite what it left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

BLOCKS = (128, 16, 4)
"""Rows of one product."""

Carry = TypeVar("Carry")


def fold_experts(
    sizes: Int[Array, "E"],
    one_expert: Callable[[Array, Array, Array, Carry], Carry],
    start: Carry,
) -> Carry:
    """Fold `one_expert(expert, begin, size, carry)` over the experts with rows, in order."""
    begins = jnp.cumsum(sizes) - sizes
    active = jnp.nonzero(sizes, size=sizes.size, fill_value=0)[0]

    def body(index: Array, carry: Carry) -> Carry:
        expert = active[index]
        return one_expert(expert, begins[expert], sizes[expert], carry)

    return lax.fori_loop(0, (sizes > 0).sum(), body, start)


def fold_blocks(
    begin: Array,
    size: Array,
    blocks: tuple[int, ...],
    one_block: Callable[[Array, int, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Fold `one_block(at, rows, carry)` over blocks that cover `size` rows from `begin` on.

    What fills more than half of a block is worth one; the smallest blocks take all that is left.
    """
    at, end = begin, begin + size
    for rows in blocks:
        spared = 0 if rows == blocks[-1] else rows // 2
        count = jnp.maximum(end - at - spared + rows - 1, 0) // rows

        def body(index: Array, carry: Carry, at: Array = at, rows: int = rows) -> Carry:
            return one_block(at + index * rows, rows, carry)

        carry = lax.fori_loop(0, count, body, carry)
        at = at + count * rows
    return carry
