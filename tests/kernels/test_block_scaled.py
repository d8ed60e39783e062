"""Products with matrices in FP8 equal those with the widened matrices, on every backend."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import block_scaled_tpu as tpu
from dsjax.kernels import experts_few_tpu as few_tpu
from dsjax.kernels.block_scaled import block_scaled_matmul
from dsjax.kernels.experts import routed_experts_reference
from dsjax.kernels.experts_few_tpu import width_of_part
from dsjax.kernels.experts_inference import apply_experts
from dsjax.kernels.swiglu import SwiGLU
from dsjax.numerics.fp8 import dequantize_blocks, quantize_blocks

ROUNDING = 2**-6
"""Of bfloat16, beside the largest value: a kernel rounds less often than its plain meaning."""


@pytest.fixture(params=["pallas", "plain XLA"])
def backend(request, monkeypatch):
    """The kernels of a TPU, interpreted; and what others run."""
    pallas = request.param == "pallas"

    def choose(*arguments, default, tpu=None, cpu=None):
        return (tpu if pallas and tpu else cpu or default)(*arguments)

    monkeypatch.setattr(lax, "platform_dependent", choose)
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda array, _: array)
    return request.param


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def check(found, expected):
    found, expected = (np.asarray(a, np.float32) for a in (found, expected))
    np.testing.assert_allclose(found, expected, atol=ROUNDING * np.abs(expected).max(initial=1e-9))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(3, 256, 384), (32, 300, 576), (5, 100, 200), (tpu.TALL + 1, 128, 128)],
)
def test_products_equal_those_with_the_widened_matrix(rows, inputs, outputs, backend):
    x = normal(0, rows, inputs).astype(jnp.bfloat16)
    matrix, scales = quantize_blocks(normal(1, inputs, outputs))
    wide = dequantize_blocks(matrix, scales, jnp.bfloat16)
    check(jax.jit(block_scaled_matmul)(x, matrix, scales), x @ wide)


def test_a_part_of_a_matrix_finds_its_own_scales(backend):
    x = normal(0, 4, 512).astype(jnp.bfloat16)
    sizes = jax.random.uniform(jax.random.key(2), (4, 6), minval=0.2)
    matrix, scales = quantize_blocks(normal(1, 512, 768) * sizes.repeat(128, 0).repeat(128, 1))
    wide = dequantize_blocks(matrix, scales, jnp.bfloat16)
    part = matrix[256:, 128:640]
    found = jax.jit(block_scaled_matmul)(x[:, 256:], part, scales, (2, 1))
    check(found, x[:, 256:] @ wide[256:, 128:640])


EXPERTS, CHOICES, ROWS, EMBED, WIDTH = 4, 2, 70, 136, 256
CASES = {
    "any": lambda rng: rng.integers(0, EXPERTS, (ROWS, CHOICES)),
    "some of nobody's": lambda rng: rng.integers(-1, EXPERTS + 2, (ROWS, CHOICES)),
    "only the last": lambda rng: np.full((ROWS, CHOICES), [-1, EXPERTS - 1]),
    "only the first": lambda rng: np.full((ROWS, CHOICES), [0, 9]),
    "one token": lambda rng: np.where(np.arange(ROWS)[:, None] == 33, [[1, 2]], EXPERTS),
    "all are nobody's": lambda rng: np.full((ROWS, CHOICES), EXPERTS),
    "one twice": lambda rng: np.full((ROWS, CHOICES), 1),
}


@cache
def compiled(backend):
    """One program for each kind of weights, whoever is chosen."""
    return jax.jit(apply_experts)


@cache
def experts_of(held):
    """Weights, their scales, and what they mean."""
    shapes = [(EXPERTS, EMBED, WIDTH)] * 2 + [(EXPERTS, WIDTH, EMBED)]
    matrices = [normal(4 + i, *shape) / 16 for i, shape in enumerate(shapes)]
    if held == "bfloat16":
        wide = SwiGLU(*(matrix.astype(jnp.bfloat16) for matrix in matrices))
        return wide, None, wide
    pairs = [quantize_blocks(matrix) for matrix in matrices]
    wide = SwiGLU(*(dequantize_blocks(*pair, jnp.bfloat16) for pair in pairs))
    return *(SwiGLU(*part) for part in zip(*pairs, strict=True)), wide


@pytest.mark.parametrize("held", ["fp8", "bfloat16"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_experts_equal_their_meaning(case, held, backend, monkeypatch):
    """In two parts, as if the core held so few tokens, and an expert's rows in several chunks."""
    monkeypatch.setattr(few_tpu, "TOKENS", few_tpu.CHUNK + 8)
    experts = jnp.asarray(case(np.random.default_rng(0)), jnp.int32)
    gates = jax.random.uniform(jax.random.key(2), experts.shape)
    x = normal(3, ROWS, EMBED).astype(jnp.bfloat16)
    weights, scales, wide = experts_of(held)
    found = compiled(backend)(x, weights, experts, gates, scales)
    ours = (experts >= 0) & (experts < EXPERTS)
    as_trained = SwiGLU(*(matrix.swapaxes(1, 2) for matrix in wide))
    check(found, routed_experts_reference(x, as_trained, experts * ours, gates * ours))


def test_an_experts_width_is_cut_into_whole_lanes_that_divide_it():
    assert width_of_part(2048, 3 * 7168) == 256
    assert width_of_part(1408, 3 * 2048 * 2) == 128  # eleven lanes
    assert width_of_part(200, 3 * 300) == 200
    assert width_of_part(512, 1) == 512
