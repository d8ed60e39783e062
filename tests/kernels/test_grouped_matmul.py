"""Products and outer products of groups of rows equal their plain meaning, on every backend."""

import importlib.util
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from dsjax.kernels import experts
from dsjax.kernels import grouped_matmul_tpu as tpu
from dsjax.kernels.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_reference,
    grouped_outer,
    grouped_outer_reference,
)
from dsjax.kernels.permutation import sort_by_expert
from dsjax.kernels.swiglu import SwiGLU

ROWS, NARROW, WIDE = 77, 24, 300  # none of which a tile divides
SIZES = {
    "even": (12, 13, 13, 13, 13, 13),
    "odd": (7, 1, 30, 2, 23, 14),
    "whole tiles": (16, 32, 16, 0, 13, 0),
    "fewer than rows": (5, 17, 0, 3, 16, 0),
    "some empty": (0, 0, 30, 0, 47, 0),
    "the first has all": (ROWS, 0, 0, 0, 0, 0),
    "the last has all": (0, 0, 0, 0, 0, ROWS),
    "one row": (0, 0, 0, 1, 0, 0),
    "none has any": (0, 0, 0, 0, 0, 0),
}


@pytest.fixture(params=["pallas", "plain XLA"])
def backend(request, monkeypatch):
    """The kernels of a TPU, interpreted, where memory is NaN at first; and what others run."""
    pallas = request.param == "pallas"

    def choose(*arguments, default, tpu=None, **_):
        return (tpu if pallas and tpu else default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(tpu, "UNROLLED", NARROW * tpu.LANES)  # so that products come in chunks
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    return request.param


@cache
def compiled(backend):
    """All products in one program for each dtype, whatever the sizes."""

    @jax.jit
    def run(narrow, wide, stack, sizes):
        return (
            grouped_matmul(sizes, (narrow, stack), inputs_first=True),
            grouped_matmul(sizes, (wide, stack), (2 * wide, stack + 1), inputs_first=False),
            grouped_outer(narrow, wide, sizes, stack, stack.dtype),
            grouped_outer(narrow, wide, sizes, None, narrow.dtype),
        )

    return run


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_products_equal_their_meaning(sizes, dtype, backend):
    keys = jax.random.split(jax.random.key(0), 3)
    narrow, wide, stack = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(
            keys, [(ROWS, NARROW), (ROWS, WIDE), (len(sizes), NARROW, WIDE)], strict=True
        )
    )
    filled, counts = sum(sizes), jnp.asarray(sizes, jnp.int32)
    # What is in rows of no group must not matter.
    found = compiled(backend)(
        narrow.at[filled:].set(jnp.nan), wide.at[filled:].set(jnp.nan), stack, counts
    )
    expected = (
        grouped_matmul_reference(counts, (narrow, stack), inputs_first=True),
        grouped_matmul_reference(counts, (wide, stack), (2 * wide, stack + 1), inputs_first=False),
        grouped_outer_reference(narrow, wide, counts, stack),
        grouped_outer_reference(narrow, wide, counts, jnp.zeros_like(stack)),
    )
    kept = slice(filled), slice(filled), slice(None), slice(None)
    for a, b, part in zip(found, expected, kept, strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(array[part], np.float32) for array in (a, b))
        tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=1))


def test_a_bfloat16_gradient_is_added_to_a_float32_stack(backend):
    left, right = (jnp.full((40, 8), value, jnp.bfloat16) for value in (1, 2**-4))
    into = jnp.full((2, 8, 8), 1024, jnp.float32)
    found = grouped_outer(left, right, jnp.array([33, 7]), into, into.dtype)
    expected = 1024 + np.array([33, 7])[:, None, None] / 16 + np.zeros((2, 8, 8))
    assert found.dtype == jnp.float32
    assert (np.asarray(found) == expected).all()  # bfloat16 has no numbers between 1024 and 1032


def test_visits_are_every_group_and_tile_that_share_a_row():
    for sizes in SIZES.values():
        visits = tpu.plan_visits(jnp.asarray(sizes), ROWS, 16)
        group_of_row = np.repeat(np.arange(len(sizes)), sizes)
        pairs = sorted({(g, n // 16) for n, g in enumerate(group_of_row)})
        count = int(visits.count)
        assert list(zip(*(a[:count].tolist() for a in visits[1:3]), strict=True)) == pairs
        assert len(visits.group) == -(-ROWS // 16) + len(sizes) - 1 >= count
        every = tpu.plan_visits(jnp.asarray(sizes), ROWS, 16, every=True)
        others = [g for g, size in enumerate(sizes) if not size]
        groups = every.group[: int(every.count)].tolist()
        assert groups == sorted([g for g, _ in pairs] + others)
        # The rest is moved by nobody, but must be there.
        assert (visits.group < len(sizes)).all() and (visits.tile < -(-ROWS // 16)).all()


def test_tiles_are_even_in_number_and_waste_no_column_if_they_can():
    largest = {
        (7168, 4096): 3584,
        (7168, 2000): 1792,
        (2048, 1024): 1024,
        (1408, 1024): 768,  # 11 lanes: no even number of equal parts
        (300, 4096): 256,
        (100, 4096): 100,
        (7168, 1): 128,
    }
    for (columns, most), part in largest.items():
        assert tpu.columns_of_tile(columns, lambda wide, most=most: wide <= most) == part


@pytest.mark.parametrize(
    ("chip", "widest"),
    [(("TPU v5p", 2, "tpu"), 128), (("TPU7x", 1, "tpu"), 256), (("cpu", None, "cpu"), 128)],
)
def test_a_tile_has_the_rows_of_a_group_on_average_or_of_the_matrix_unit(chip, widest):
    """The chips are those of the mesh; where they are no TPU's, nothing is compiled for one."""
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), abstract_device=jax.sharding.AbstractDevice(*chip)
    )
    with jax.sharding.use_abstract_mesh(mesh):
        cases = [(98_304, 32), (2048, 32), (1024, 256), (1, 8)]
        assert [tpu.rows_of_tile(*case) for case in cases] == [widest, 64, 16, 16]


def test_the_compiler_is_told_the_operations_and_bytes_of_the_shapes():
    """Rows are read once for each part of the columns, matrices and results once."""
    rows, matrices, sizes = (
        jax.ShapeDtypeStruct((1000, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 512, 768), jnp.bfloat16),
        jax.ShapeDtypeStruct((4,), jnp.int32),
    )
    wide = jax.ShapeDtypeStruct((1000, 768), jnp.bfloat16)
    into = jax.ShapeDtypeStruct((4, 512, 768), jnp.float32)
    flops = 2 * 1000 * 512 * 768
    matrix_bytes, row_bytes, wide_bytes = 4 * 512 * 768 * 2, 1000 * 512 * 2, 1000 * 768 * 2
    product = partial(grouped_matmul, inputs_first=True)
    assert told(product, sizes, (rows, matrices)) == {
        "grouped_matmul": [(flops, 2 * row_bytes + matrix_bytes + wide_bytes)]
    }
    assert told(product, sizes, (rows, matrices), (rows, matrices)) == {
        "grouped_matmul": [(2 * flops, 2 * (2 * row_bytes + matrix_bytes) + wide_bytes)]
    }
    assert told(partial(grouped_outer, dtype=jnp.float32), rows, wide, sizes, into) == {
        "grouped_outer": [(flops, 2 * row_bytes + 2 * wide_bytes + 2 * 2 * matrix_bytes)]
    }


def told(function, *arguments):
    """By name, what a TPU's compiler hears of each kernel: operations and bytes."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    kernels = {}
    for line in text.splitlines():
        if "tpu_custom_call" in line:
            name = re.search(r'kernel_name = "(\w+)"', line)[1]
            flops, moved = (
                int(re.search(rf"{key}\\22:\s*(\d+)", line)[1])
                for key in ("flops", "bytes_accessed")
            )
            kernels.setdefault(name, []).append((flops, moved))
    return kernels


def test_where_xla_splits_a_program_it_multiplies_itself():
    """It cannot split a kernel; inside of a `shard_map` there is nothing left to split."""
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)
    matrices = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)
    arguments = jax.ShapeDtypeStruct((4,), jnp.int32), (rows, matrices)
    product = partial(grouped_matmul, inputs_first=True)
    by_hand = jax.shard_map(product, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.set_mesh(mesh):
        assert told(product, *arguments) == {}
        assert list(told(by_hand, *arguments)) == ["grouped_matmul"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_compiles_for_a_tpu_and_copies_no_stack(dtype, monkeypatch):
    """Forward and backward, for chips that are described only; sums are added to in place."""
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    place = jax.sharding.SingleDeviceSharding(chips.devices[0])
    tokens, choices, groups, embed, width = 300, 3, 32, 768, 384

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def stacks(dtype):
        return SwiGLU(
            shape(groups, width, embed, dtype=dtype),
            shape(groups, width, embed, dtype=dtype),
            shape(groups, embed, width, dtype=dtype),
        )

    def layer(x, weights, chosen, gates, dy, into):
        order = sort_by_expert(chosen, groups)
        y, before = experts.multiply(x, weights, order, gates)
        return y, experts.multiply_gradient(x, weights, order, gates, before, dy, into, jnp.float32)

    arguments = (
        shape(tokens, embed),
        stacks(dtype),
        shape(tokens, choices, dtype=jnp.int32),
        shape(tokens * choices, dtype=jnp.float32),
        shape(tokens, embed),
        stacks(jnp.float32),
    )
    program = jax.jit(layer, donate_argnums=5).lower(*arguments).compile()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", program.as_text())) == 8
    memory = program.memory_analysis()
    one_stack = groups * width * embed * 4
    assert memory.alias_size_in_bytes == 3 * one_stack
    assert memory.temp_size_in_bytes < one_stack
