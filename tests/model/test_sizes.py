"""The released models have their published sizes, and compiling does not grow with depth."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from reference.configs import CONFIGS

from dsjax.architecture import ModelConfig
from dsjax.checkpoint.families import tensors
from dsjax.config_files import load_model_config
from dsjax.model.layers import RouterBias, count_parameters
from dsjax.model.transformer import Transformer


def abstract(config: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda key: Transformer(config, key), jax.random.key(0))


def test_671b_has_the_published_parameter_count() -> None:
    began = time.monotonic()
    model = abstract(load_model_config("v3-671b"))
    assert count_parameters(model) == 682_636_487_424
    assert count_parameters(model.mtp) == 11_610_068_224
    assert count_parameters(model) - count_parameters(model.mtp) == 671_026_419_200
    biases = count_parameters(nnx.state(model, RouterBias))
    assert biases == 14_848 + 256
    assert count_parameters(nnx.state(model, nnx.Param)) == 682_636_472_320
    assert time.monotonic() - began < 20


def test_the_files_of_671b_repeat_embedding_and_head() -> None:
    assert sum(tensor.size for tensor in tensors(load_model_config("v3-671b"))) == 684_489_845_504


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("r1", 682_636_487_424),
        ("v2-236b", 235_741_434_880),
        ("v2-lite-16b", 15_706_484_224),
        ("moonlight-16b", 15_960_110_208),
        ("kimi-k2", 1_026_408_232_448),
        ("r1-distill-qwen-1.5b", 1_777_088_000),
        ("r1-distill-qwen-7b", 7_615_616_512),
        ("r1-distill-qwen-14b", 14_770_033_664),
        ("r1-distill-qwen-32b", 32_763_876_352),
        ("r1-distill-llama-8b", 8_030_261_248),
        ("r1-distill-llama-70b", 70_553_706_496),
        ("r1-0528-qwen3-8b", 8_190_735_360),
    ],
)
def test_other_releases_have_their_published_counts(name: str, count: int) -> None:
    assert count_parameters(abstract(load_model_config(name))) == count


def test_671b_is_traced_at_its_full_length() -> None:
    model = abstract(load_model_config("v3-671b"))
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    out = jax.eval_shape(
        lambda m, t: (lambda o: (o.logits, o.mtp_logits, o.load))(m(t)), model, tokens
    )
    logits, mtp_logits, load = out
    assert logits.shape == (1, 4096, 129_280) and logits.dtype == jnp.float32
    assert [x.shape for x in mtp_logits] == [(1, 4096, 129_280)]
    assert load.shape == (58, 256)


def test_the_program_does_not_grow_with_depth() -> None:
    def lines(depth: int) -> int:
        config = CONFIGS["v3"].model_copy(
            update={"num_hidden_layers": depth, "first_k_dense_replace": depth // 2}
        )
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        lowered = jax.jit(lambda model, tokens: model(tokens).logits).lower(
            abstract(config), tokens
        )
        return len(lowered.as_text().splitlines())

    assert lines(4) == lines(24)
