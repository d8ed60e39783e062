"""Rows that are brought one by one, and sums of them, equal their plain meaning."""

import importlib.util
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies

from dsjax.kernels import grouped_matmul_tpu, rows_tpu
from dsjax.kernels.permutation import sort_visitors
from dsjax.kernels.rows import send_rows, sum_rows, sum_rows_reference, take_rows, unwritten

WIDTH = rows_tpu.WHOLE
SUMS, MOST = 140, 3
COUNTS = {
    "any number of rows": [2, 0, 3, 1, 3, 0, 1],
    "many first": [3, 3, 2, 1, 0, 0, 0],
    "all of them": [3] * SUMS,
    "none at all": [],
    "the last one": [0] * (SUMS - 1) + [2],
    "tiles without any": [2] * 10 + [0] * 120 + [3] * 10,
}


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels of a TPU, where memory that nothing was written to is NaN."""

    def choose(*arguments, default, tpu=None, **_):
        return (tpu or default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


@cache
def compiled(dtype):
    return jax.jit(sum_rows)


def named(counts, rows):
    """Lines of `at` with so many rows each, of those that are no multiple of 5."""
    rng = np.random.default_rng(0)
    some = rng.permutation([n for n in range(rows) if n % 5])
    at = np.full((SUMS, MOST), rows)
    for line, count in enumerate(counts):
        at[line, :count] = rng.choice(some, count)
    return jnp.asarray(at, jnp.int32)


def numbers(rows, dtype):
    values = jax.random.normal(jax.random.key(0), (rows, WIDTH)).astype(dtype)
    return values.at[::5].set(jnp.nan)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_sums_of_rows_equal_their_meaning(counts, dtype, interpreted):
    rows, at = numbers(21, dtype), named(counts, 21)
    found = compiled(dtype)(rows, at)
    expected = sum_rows_reference(rows, at)
    assert found.dtype == dtype
    assert np.isfinite(np.asarray(expected, np.float32)).all()
    assert (found == expected).all()


@pytest.mark.parametrize(("dtype", "taken"), [(jnp.float32, 1), (jnp.bfloat16, 300)])
def test_rows_are_taken_as_they_are(dtype, taken, interpreted):
    rows = numbers(21, dtype)
    index = jax.random.randint(jax.random.key(1), (taken,), 0, 21)
    take = jax.jit(take_rows)
    for count in (taken, taken // 3):
        found = take(rows, index, jnp.int32(count))
        assert found.dtype == dtype and found.shape == (taken, WIDTH)
        found, expected = (np.asarray(a[:count], np.float32) for a in (found, rows[index]))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("width", [WIDTH, 24])
def test_rows_to_send_are_those_of_their_indices(width):
    x = jnp.arange(6 * width, dtype=jnp.float32).reshape(6, width)
    index = jnp.array([[5, 0], [2, 2], [1, 3]])
    assert (send_rows(x, index) == x[index]).all()


def test_narrow_rows_are_left_to_xla(interpreted):
    rows = jnp.ones((4, WIDTH - rows_tpu.LANES))
    text = str(jax.make_jaxpr(sum_rows)(rows, jnp.zeros((2, 2), jnp.int32)))
    assert "pallas_call" not in text
    text = str(jax.make_jaxpr(take_rows)(rows, jnp.zeros(2, jnp.int32), jnp.int32(2)))
    assert "pallas_call" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_whose_rows_lie_apart_is_the_same_product(dtype, interpreted):
    keys = jax.random.split(jax.random.key(2))
    rows = jax.random.normal(keys[0], (40, 16)).astype(dtype)
    matrices = jax.random.normal(keys[1], (3, WIDTH, 16)).astype(dtype)

    @jax.jit
    def both(sizes):
        return [
            grouped_matmul_tpu.grouped_matmul(
                sizes, (rows, matrices), inputs_first=False, apart=apart
            )
            for apart in (True, False)
        ]

    for sizes in ([7, 20, 5], [0, 33, 0], [40, 0, 0]):
        found, expected = (out[: sum(sizes)] for out in both(jnp.array(sizes)))
        assert (found == expected).all()


def test_memory_is_given_that_nothing_was_written_to(interpreted):
    rows = jnp.ones((6, 8, 128), jnp.bfloat16)
    given = unwritten(rows)
    assert (given.shape, given.dtype) == (rows.shape, rows.dtype)
    assert jnp.isnan(given).all()


def test_the_rows_of_each_visitor_are_found():
    """Three pairs of the first row, one of the second, one of a third, from two senders."""
    experts = jnp.array([[1, 0, 0, 2, 3], [0, 2, 3, 3, 3]])
    rows = jnp.array([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    pairs = jnp.array([[3, 1], [1, 1]])
    order, pair_of_row = sort_visitors(experts, rows, pairs, 3, 3)
    position = {int(pair): place for place, pair in enumerate(pair_of_row)}
    beyond = experts.size
    expected = [
        [position[0], position[1], position[2]],
        [position[3], beyond, beyond],
        [position[5], beyond, beyond],
        [position[6], beyond, beyond],
    ]
    assert order.row_of_choice.tolist() == expected


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'",
)
def test_rows_that_lie_apart_are_turned_by_no_copy(monkeypatch):
    """From a product to their sums, and on to the next product, for chips that are described."""
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    place = jax.sharding.SingleDeviceSharding(chips.devices[0])
    width = 7 * WIDTH

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def step(sizes, rows, matrices, at, index):
        out = grouped_matmul_tpu.grouped_matmul(
            sizes, (rows, matrices), inputs_first=False, apart=True
        )
        return rows_tpu.take_rows(rows_tpu.sum_rows(out, at), index, sizes.sum())

    compiled = (
        jax.jit(step)
        .lower(
            shape(4, dtype=jnp.int32),
            shape(4096, 256),
            shape(4, width, 256),
            shape(2000, MOST, dtype=jnp.int32),
            shape(3000, dtype=jnp.int32),
        )
        .compile()
    )
    memory = compiled.memory_analysis()
    products, sums = (count * width * 2 for count in (4096, 2000))
    assert memory.temp_size_in_bytes < 1.05 * (products + sums)
