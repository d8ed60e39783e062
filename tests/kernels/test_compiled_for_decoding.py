"""Kernels of decoding, compiled for chips that are described only: a part of R1's layer."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from dsjax.kernels import block_scaled_tpu, experts_few_tpu, paged_attention_tpu
from dsjax.kernels.swiglu import SwiGLU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, the compiler for TPUs: pip install 'jax[tpu]'",
    ),
]

EMBED, WIDTH, E4M3 = 7168, 2048, jnp.float8_e4m3fn


def experts(tokens, count=2):
    stacks = [(count, EMBED, WIDTH)] * 2 + [(count, WIDTH, EMBED)]
    return (
        experts_few_tpu.apply_experts,
        ((tokens, EMBED), jnp.bfloat16),
        SwiGLU(*((shape, E4M3) for shape in stacks)),
        SwiGLU(*(((count, a // 128, b // 128), jnp.float32) for _, a, b in stacks)),
        ((tokens, 8), jnp.int32),
        ((tokens, 8), jnp.float32),
    )


def dense(rows, inputs, outputs):
    def product(x, matrix, scales):
        return block_scaled_tpu.block_scaled_matmul(x, matrix, scales, (0, 0))

    scales = -(-inputs // 128), -(-outputs // 128)
    shapes = (rows, inputs), jnp.bfloat16
    return product, shapes, ((inputs, outputs), E4M3), (scales, jnp.float32)


def attention(rows, queries, heads, pages=16):
    def attend(q, cache, positions, table):
        return paged_attention_tpu.latent_attention(
            q, cache, positions, table, value_width=512, scale=0.1
        )

    return (
        attend,
        ((rows, queries, heads, 576), jnp.bfloat16),
        ((1, rows * pages, 32, 640), jnp.bfloat16),
        ((rows, queries), jnp.int32),
        ((rows, pages), jnp.int32),
    )


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "case",
    [experts(32), experts(256), dense(32, EMBED, 640), dense(2, 1536, 1152),
     attention(4, 1, 8), attention(4, 2, 128)],
    ids=["experts", "many tokens", "dense", "half a tile", "attention", "all heads and a draft"],
)  # fmt: skip
def test_a_kernel_compiles_and_nothing_is_copied_for_it(case, topology, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", f"{topology.partition(':')[0]}-8")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    place = jax.sharding.SingleDeviceSharding(chips.devices[0])
    function, *described = case
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(*leaf, sharding=place),
        described,
        is_leaf=lambda node: type(node) is tuple,
    )
    program = jax.jit(function).lower(*arguments).compile()
    assert len(re.findall(r"custom_call_target=\"tpu_custom_call\"", program.as_text())) == 1
    assert program.memory_analysis().temp_size_in_bytes < 2**20
