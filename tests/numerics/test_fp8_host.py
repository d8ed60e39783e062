"""FP8 on the host equals its definition bit by bit, refuses what is damaged, and stays small."""

import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.errors import UserError
from dsjax.numerics import fp8
from dsjax.numerics.fp8_host import E4M3, dequantize_into, quantize_into, scale_shape
from tests.numerics import definition
from tests.numerics.definition import BLOCKS
from tests.numerics.hard_cases import CASES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WHERE = "model-00001.safetensors: mlp.up_proj.weight"


def quantized(weight, **options):
    values = np.full(weight.shape, 1, E4M3)
    scales = np.full(scale_shape(weight.shape), np.nan, np.float32)
    quantize_into(values, scales, weight, WHERE, **options)
    return values, scales


def dequantized(values, scales, dtype=np.float32):
    out = np.full(values.shape, np.nan, dtype)
    dequantize_into(out, values, scales, WHERE)
    return out


def assert_same_bits(a, b):
    as_bits = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(a).view(as_bits), np.asarray(b).view(as_bits))


def random_weight(rows, columns, seed=0):
    """Values but NaN, and scales."""
    rng = np.random.default_rng(seed)
    magnitudes = rng.integers(0, 127, (rows, columns), dtype=np.uint8)
    signs = rng.integers(0, 2, (rows, columns), dtype=np.uint8) << 7
    scales = rng.uniform(1e-5, 1e-3, scale_shape((rows, columns))).astype(np.float32)
    return (magnitudes | signs).view(E4M3), scales


@pytest.mark.parametrize("power_of_two", [False, True], ids=["any scale", "powers of two"])
@pytest.mark.parametrize("case", CASES)
def test_both_directions_equal_the_definition(case, power_of_two):
    values, scales = definition.quantize(CASES[case], BLOCKS, power_of_two)
    found = quantized(CASES[case], power_of_two=power_of_two)
    assert_same_bits(found[0], values)
    assert_same_bits(found[1], scales)
    widened = definition.dequantize(values, scales, BLOCKS)
    assert_same_bits(dequantized(*found), widened)
    assert_same_bits(dequantized(*found, BFLOAT16), definition.to_bfloat16(widened))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (257, 1153), (3, 70_000)])
def test_any_shape_equals_the_definition(shape):
    weight = np.resize(CASES["weights"], shape)
    values, scales = quantized(weight)
    expected = definition.quantize(weight, BLOCKS)
    assert_same_bits(values, expected[0])
    assert_same_bits(scales, expected[1])
    widened = definition.dequantize(*expected, BLOCKS)
    assert_same_bits(dequantized(values, scales, BFLOAT16), definition.to_bfloat16(widened))


def test_host_and_device_agree():
    weight = np.resize(CASES["activations"], (257, 1153)) * np.float32(0.37)
    found = quantized(weight)
    for here, there in zip(found, jax.jit(fp8.quantize_blocks)(weight), strict=True):
        assert_same_bits(here, there)
    there = jax.jit(partial(fp8.dequantize_blocks, dtype=jnp.bfloat16))(*found)
    assert_same_bits(dequantized(*found, BFLOAT16), there)


def test_an_empty_weight_is_nothing_to_do():
    for shape in [(0, 5), (5, 0)]:
        assert dequantized(*quantized(np.zeros(shape, np.float32))).shape == shape


def test_bfloat16_is_quantized_like_the_float32_that_it_is():
    weight = CASES["weights"].astype(BFLOAT16)
    for a, b in zip(quantized(weight), quantized(weight.astype(np.float32)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_every_byte_widens_to_its_value(dtype):
    values = np.arange(256, dtype=np.uint8)[None]
    scales = np.array([[0.3, 7.0]], np.float32)
    expected = definition.dequantize(values, scales, BLOCKS)
    assert np.isnan(expected).sum() == 2
    if dtype == BFLOAT16:
        finite = definition.to_bfloat16(np.nan_to_num(expected)).astype(np.float32)
        expected = np.where(np.isnan(expected), expected, finite)
    found = dequantized(values.view(E4M3), scales, dtype).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


def test_a_weight_dequantized_to_float32_gives_its_bits_back():
    weight = np.random.default_rng(0).standard_normal((700, 3000)).astype(np.float32)
    weight *= np.exp(np.linspace(-5, 5, 700, dtype=np.float32))[:, None]
    values, scales = quantized(weight)
    again = quantized(dequantized(values, scales))
    assert_same_bits(again[0], values)
    assert_same_bits(again[1], scales)


@pytest.mark.parametrize("start", [(0, 0), (72, 0), (127, 129), (128, 256), (200, 77)])
@pytest.mark.parametrize("size", [(1, 1), (72, 600), (130, 130)])
def test_a_slice_is_widened_like_that_slice_of_the_whole(start, size):
    values, scales = random_weight(400, 700)
    here = tuple(slice(begin, begin + n) for begin, n in zip(start, size, strict=True))
    expected = dequantized(values, scales)[here]
    out = np.full(expected.shape, np.nan, np.float32)
    dequantize_into(out, values[here], scales, WHERE, start)
    assert_same_bits(out, expected)


def test_nothing_beside_the_given_output_is_written():
    """Outputs that are slices of larger arrays, with gaps."""
    values, scales = random_weight(150, 300)
    large = np.full((150, 2, 310), 5, BFLOAT16)
    dequantize_into(large[:, 1, 4:304], values, scales, WHERE)
    assert_same_bits(large[:, 1, 4:304], dequantized(values, scales, BFLOAT16))
    assert (large[:, 0] == 5).all() and (large[:, 1, :4] == 5).all()
    assert (large[:, 1, 304:] == 5).all()
    bytes_of = np.full((150, 310), 9, np.uint8)
    weight = dequantized(values, scales)
    quantize_into(bytes_of[:, 5:305].view(E4M3), np.zeros_like(scales), weight, WHERE)
    assert_same_bits(bytes_of[:, 5:305], quantized(weight)[0])
    assert (bytes_of[:, :5] == 9).all() and (bytes_of[:, 305:] == 9).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -0.0, -1e-4])
def test_a_scale_that_is_no_scale_is_refused_by_its_block(bad):
    values, scales = random_weight(300, 500)
    scales[1, 2] = scales[2, 0] = bad
    with pytest.raises(UserError) as caught:
        dequantized(values, scales)
    expected = (
        f"{WHERE}: the scale of block [1, 2] is {np.float32(bad)}, expected a positive number"
    )
    assert str(caught.value).startswith(expected)
    assert "(2 of 12 are none)" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "start"), [((2, 4), (0, 0)), ((4, 3), (0, 0)), ((3, 4), (84, 0))]
)
def test_scales_that_do_not_reach_are_refused(shape, start):
    values, _ = random_weight(301, 500)
    out = np.zeros(values.shape, np.float32)
    with pytest.raises(UserError, match=rf"{WHERE}: .*\[301, 500\] .* found \[{shape[0]}, "):
        dequantize_into(out, values, np.ones(shape, np.float32), WHERE, start)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_a_weight_that_is_not_finite_is_refused_by_its_place(bad, dtype):
    weight = np.ones((200, 1100), dtype)
    weight[131, 1029] = bad
    with pytest.raises(UserError) as caught:
        quantized(weight)
    assert str(caught.value).startswith(f"{WHERE}: the value at [131, 1029] is {bad};")


# ---------------------------------------------------------------------------------------------
# As a stream needs it
# ---------------------------------------------------------------------------------------------


def test_importing_it_does_not_import_jax():
    code = "import sys, dsjax.numerics.fp8_host; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_memory_beside_the_arrays_does_not_grow_with_the_weight(dtype):
    peaks = []
    for rows in (256, 2048):
        values, scales = random_weight(rows, 4096)
        out = np.zeros(values.shape, dtype)
        tracemalloc.start()
        dequantize_into(out, values, scales, WHERE)
        quantize_into(values, scales, out, WHERE)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 8 << 20


def test_threads_do_not_disturb_one_another():
    weights = [random_weight(300, 1000, seed) for seed in range(8)]
    expected = [dequantized(*weight) for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda weight: dequantized(*weight), weights))
        again = list(pool.map(quantized, found))
    for a, b, c in zip(found, expected, again, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(c[0], quantized(b)[0])


@pytest.mark.parametrize("direction", ["dequantize", "quantize"])
def test_other_threads_run_meanwhile(direction):
    """With switching switched off, another thread runs only where numpy lets it."""
    values, scales = random_weight(1024, 4096)
    weight = dequantized(values, scales)
    work = {
        "dequantize": lambda: dequantize_into(weight, values, scales, WHERE),
        "quantize": lambda: quantize_into(values, scales, weight, WHERE),
    }[direction]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        turns = 0
        while thread.is_alive():
            time.sleep(0.0001)
            turns += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert turns > 2
