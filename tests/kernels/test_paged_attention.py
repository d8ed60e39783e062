from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import paged_attention_tpu as tpu
from dsjax.kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    places_of,
    write_pages,
)

pytestmark = pytest.mark.usefixtures("thorough_compiler")

GROUPS, PAGES, SIZE, WIDTH, HEADS = 2, 52, 16, 12, 6
RANK = 8
LENGTHS = [1, 16, 270, 511]
"""Tokens of each row, two rows a group; 256 keys are read at a time."""


def shared(latent):
    """Keys are the whole latent and values its first part, one for all heads."""
    return latent[:, :, None], latent[:, :, None, :RANK]


def apart(latent, heads=HEADS):
    """Keys and values of each head, made from the latent."""
    weight = jax.random.normal(jax.random.key(5), (WIDTH, heads, WIDTH + RANK))
    both = jnp.einsum("btw,whk->bthk", latent, weight)
    return both[..., :WIDTH], both[..., WIDTH:]


def grouped(latent):
    """Two keys, each for three heads."""
    return apart(latent, heads=2)


def table():
    """Every row's pages, none shared, in no order; the rest names no page."""
    rng = np.random.default_rng(0)
    pages = np.stack([rng.permutation(PAGES) for _ in range(GROUPS)])
    rows = np.full((4, 34), PAGES, np.int32)
    for row, length in enumerate(LENGTHS):
        needed = -(-length // SIZE)
        first = 0 if row % 2 == 0 else -(-LENGTHS[row - 1] // SIZE)
        rows[row, :needed] = pages[row // 2, first : first + needed]
    return jnp.asarray(rows)


@pytest.mark.parametrize(("keys_values", "keys"), [(shared, 1), (grouped, 2), (apart, HEADS)])
@pytest.mark.parametrize("queries", [1, 5])
def test_paged_attention_says_what_one_softmax_over_the_row_says(keys_values, keys, queries):
    latents = jax.random.normal(jax.random.key(1), (4, 512, WIDTH))
    q = jax.random.normal(jax.random.key(2), (4, queries, HEADS, WIDTH))
    lengths = np.array(LENGTHS)
    starts = jnp.asarray(np.maximum(lengths - queries, 0))

    @jax.jit
    def both(q, latents):
        # What no row has written must not matter.
        pages = jnp.full((GROUPS, PAGES, SIZE, WIDTH), 1e3)
        find = {"table": table(), "pages": PAGES, "page_size": SIZE}
        everything = places_of(jnp.zeros(4, int), jnp.asarray(lengths), queries=512, **find)
        pages = write_pages(pages, latents, everything.slots)
        places = places_of(starts, jnp.asarray(lengths) - starts, queries=queries, **find)
        found = paged_attention(q, pages, places, keys_values, keys, RANK, 0.3)
        expected = paged_attention_reference(q, latents, places.positions, keys_values, 0.3)
        return found, expected

    found, expected = both(q, latents)
    assert jnp.abs(found - expected).max() < 1e-5 * jnp.abs(expected).max()


@pytest.mark.parametrize("queries", [1, 3])
def test_the_kernel_of_a_tpu_says_the_same_of_latents(queries, monkeypatch):
    """Interpreted. A row of one token, whole pages, one that reads past a stretch, a full one."""
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda array, _: array)
    monkeypatch.setattr(tpu, "KEYS", 256)
    latents = jax.random.normal(jax.random.key(1), (4, 512, WIDTH))
    q = jax.random.normal(jax.random.key(2), (4, queries, HEADS, WIDTH))
    lengths = jnp.asarray(LENGTHS)
    starts = jnp.maximum(lengths - queries, 0)

    @jax.jit
    def both(q, latents):
        # What no row has written must not matter.
        pages = jnp.full((GROUPS, PAGES, SIZE, WIDTH), 1e3)
        find = {"table": table(), "pages": PAGES, "page_size": SIZE}
        everything = places_of(jnp.zeros(4, int), lengths, queries=512, **find)
        pages = write_pages(pages, latents, everything.slots)
        places = places_of(starts, lengths - starts, queries=queries, **find)
        found = tpu.latent_attention(
            q, pages, places.positions, places.table, value_width=RANK, scale=0.3
        )
        expected = paged_attention_reference(q, latents, places.positions, shared, 0.3)
        return found, expected

    found, expected = both(q, latents)
    assert jnp.abs(found - expected).max() < 1e-5 * jnp.abs(expected).max()


def test_what_a_row_does_not_keep_is_written_nowhere():
    pages = jnp.zeros((1, 3, 4, 2))
    rows = jnp.array([[2, 0], [1, 3]])  # 3 names no page
    places = places_of(jnp.array([3, 4]), jnp.array([2, 3]), rows, queries=3, pages=3, page_size=4)
    written = write_pages(pages, jnp.ones((2, 3, 2)), places.slots).sum(-1)[0]
    # Row 0 keeps positions 3 and 4; row 1 has no page for 4 to 6.
    assert written.tolist() == [[2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]


def test_positions_beyond_the_table_are_written_nowhere():
    places = places_of(
        jnp.array([7]), jnp.array([3]), jnp.array([[1, 2]]), queries=3, pages=3, page_size=4
    )
    assert places.slots.tolist() == [[11, 12, 12]]
