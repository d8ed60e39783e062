"""FP8 on devices equals its definition bit by bit, however arrays are cut, batched and sharded."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.numerics import fp8
from tests.numerics import definition
from tests.numerics.definition import BLOCKS, TILES
from tests.numerics.hard_cases import CASES

pytestmark = pytest.mark.usefixtures("thorough_compiler")

QUANTIZE = {
    sides: jax.jit(function, static_argnames="power_of_two")
    for sides, function in {TILES: fp8.quantize_tiles, BLOCKS: fp8.quantize_blocks}.items()
}
DEQUANTIZE = {
    sides: jax.jit(function, static_argnames="dtype")
    for sides, function in {TILES: fp8.dequantize_tiles, BLOCKS: fp8.dequantize_blocks}.items()
}


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("sides", [TILES, BLOCKS], ids=["tiles", "blocks"])
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("case", CASES)
def test_both_directions_equal_the_definition(case, power_of_two, sides):
    values, scales = definition.quantize(CASES[case], sides, power_of_two)
    found = QUANTIZE[sides](CASES[case], power_of_two=power_of_two)
    assert_same_bits(found, (values, scales))
    widened = definition.dequantize(values, scales, sides)
    assert_same_bits([DEQUANTIZE[sides](*found)], [widened])
    narrow = DEQUANTIZE[sides](*found, dtype=jnp.bfloat16)
    assert_same_bits([narrow], [definition.to_bfloat16(widened)])


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 256])
@pytest.mark.parametrize("sides", [TILES, BLOCKS], ids=["tiles", "blocks"])
def test_any_width_equals_the_definition(columns, sides):
    """A single block is where XLA would multiply by a reciprocal."""
    x = 5 * CASES["activations"][:, :columns]
    assert_same_bits(QUANTIZE[sides](x), definition.quantize(x, sides))


@pytest.mark.parametrize("sides", [TILES, BLOCKS], ids=["tiles", "blocks"])
def test_running_without_jit_changes_nothing(sides):
    eager = {TILES: fp8.quantize_tiles, BLOCKS: fp8.quantize_blocks}[sides]
    x = jnp.asarray(CASES["activations"])
    assert_same_bits(eager(x), QUANTIZE[sides](x))


def test_bfloat16_is_quantized_like_the_float32_that_it_is():
    x = CASES["weights"].astype(ml_dtypes.bfloat16)
    for sides in (TILES, BLOCKS):
        assert_same_bits(QUANTIZE[sides](x), QUANTIZE[sides](x.astype(np.float32)))


def test_stacked_weights_are_quantized_each_on_its_own():
    stack = np.stack([CASES["weights"], CASES["activations"]])[None]
    apart = [definition.quantize(w, BLOCKS) for w in stack[0]]
    expected = [np.stack(parts)[None] for parts in zip(*apart, strict=True)]
    found = QUANTIZE[BLOCKS](stack)
    assert_same_bits(found, expected)
    mapped = jax.jit(jax.vmap(fp8.quantize_blocks))(stack[0])
    assert_same_bits(mapped, [part[0] for part in expected])
    widened = jax.jit(jax.vmap(fp8.dequantize_blocks))(*mapped)
    assert_same_bits([widened], [DEQUANTIZE[BLOCKS](*found)[0]])


def test_one_vector_and_no_tokens_are_tiled_too():
    vector = CASES["activations"][3]
    expected = definition.quantize(vector[None], TILES)
    assert_same_bits(QUANTIZE[TILES](vector), [part[0] for part in expected])
    none = QUANTIZE[TILES](np.zeros((0, 5, 258), np.float32))
    assert none.scales.shape == (0, 5, 3)
    assert DEQUANTIZE[TILES](*none).shape == (0, 5, 258)


@pytest.mark.parametrize("spec", [("x",), (None, "x")], ids=["rows", "columns"])
@pytest.mark.parametrize("sides", [TILES, BLOCKS], ids=["tiles", "blocks"])
def test_eight_devices_equal_one(sides, spec):
    """Devices own 72 rows, or 32 columns: their borders run through the blocks."""
    x = jnp.asarray(np.resize(CASES["activations"], (576, 256)))
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("x",))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert len(spread.sharding.device_set) == 8
    found = QUANTIZE[sides](spread)
    assert_same_bits(found, definition.quantize(np.asarray(x), sides))
    assert_same_bits([DEQUANTIZE[sides](*found)], [DEQUANTIZE[sides](*QUANTIZE[sides](x))])


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tile_that_is_not_finite_becomes_nan_and_no_other_does(bad, power_of_two):
    x = CASES["activations"].copy()
    x[7, 130] = bad
    q = QUANTIZE[TILES](x, power_of_two=power_of_two)
    y = DEQUANTIZE[TILES](*q)
    lost = np.zeros(x.shape, bool)
    lost[7, 128:256] = True
    np.testing.assert_array_equal(np.isnan(y), lost)
    assert np.argwhere(~np.isfinite(q.scales)).tolist() == [[7, 1]]


def test_every_byte_widens_to_its_value():
    values = np.arange(256, dtype=np.uint8)[None]
    scales = np.array([[0.3, 7.0]], np.float32)
    expected = definition.dequantize(values, scales, TILES)
    assert np.isnan(expected).sum() == 2
    found = DEQUANTIZE[TILES](values.view(ml_dtypes.float8_e4m3fn), scales)
    np.testing.assert_array_equal(found, expected)


def test_scales_of_another_shape_are_refused():
    values = np.zeros((576, 256), ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\[576, 256\] need scales .* \[5, 2\], found \[2, 5\]"):
        DEQUANTIZE[BLOCKS](values, np.ones((2, 5), np.float32))


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("case", CASES)
def test_each_value_is_off_by_a_sixteenth_at_most(case, power_of_two):
    """2^-4 of the value, or half a step of e4m3's denormals, which are 2^-9 scales apart."""
    x = CASES[case].astype(np.float64)
    q = QUANTIZE[TILES](CASES[case], power_of_two=power_of_two)
    off = np.abs(np.asarray(DEQUANTIZE[TILES](*q), np.float64) - x)
    half_step = 2.0**-10 * np.repeat(np.asarray(q.scales, np.float64), 128, 1)[:, : x.shape[1]]
    assert (off <= np.maximum(2.0**-4 * np.abs(x), half_step * (1 + 1e-6))).all()


def dequantized(dtype):
    """FP8 tiles under 4,096 scales of many sizes, and what they mean."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.standard_normal((4096, 1)))
    q = QUANTIZE[TILES]((sizes * rng.standard_normal((4096, 128))).astype(np.float32))
    return q, DEQUANTIZE[TILES](*q, dtype=dtype)


def test_quantizing_again_through_float32_gives_values_and_scales_back():
    q, x = dequantized(jnp.float32)
    assert_same_bits(QUANTIZE[TILES](x), q)


def test_quantizing_again_through_bfloat16_gives_the_values_back_but_not_the_scales():
    q, x = dequantized(jnp.bfloat16)
    again = QUANTIZE[TILES](x)
    assert_same_bits([again.values], [q.values])
    assert np.mean(np.asarray(again.scales == q.scales)) < 0.01


def test_quantizing_again_under_powers_of_two_gives_little_back():
    q, x = dequantized(jnp.float32)
    again = QUANTIZE[TILES](x, power_of_two=True)
    assert np.mean(np.asarray(again.scales == q.scales)) < 0.01
    assert np.mean(bits(again.values) == bits(q.values)) < 0.1
