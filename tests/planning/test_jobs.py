"""Steps that are ready to be compiled: on CPU devices, which are there."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jaxtyping
import pytest

from dsjax.config_files import load_model_config, load_pretrain_config
from dsjax.config_serving import ServingConfig
from dsjax.errors import UserError
from dsjax.planning.serve import serving_job
from dsjax.planning.train import microbatches, train_job

SERVING = ServingConfig(task="serve", model="cpu-tiny", rows=12, context=64, mesh={"expert": 4})


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """A decoder of shapes alone is none of arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
def test_a_train_step_is_that_of_the_largest_batch():
    config = load_pretrain_config(
        "cpu-tiny",
        [
            "training.batch_size=[{value: 8, until: 10K}, {value: 24}]",
            "data.sequence_length=64",
            "mesh.fsdp=8",
        ],
    )
    assert microbatches(config) == (3, 8)
    job = train_job(config, jax.devices()[:8])
    assert job.tokens == 24 * 64
    assert job.details["run_tokens"] == 80_000
    assert "3x8x64xi32" in job.lowered.as_text()


def test_a_microbatch_that_does_not_divide_is_named():
    config = load_pretrain_config("cpu-tiny", ["training.microbatch_size=4", "mesh.fsdp=8"])
    with pytest.raises(UserError, match=r"training\.microbatch_size=4.*not divisible"):
        train_job(config, jax.devices()[:8])


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_decoding_continues_every_row_and_prefill_reads_a_part_of_a_prompt():
    model = load_model_config("cpu-tiny")
    decode = serving_job(model, SERVING, jax.devices()[:4])
    assert decode.tokens == 12  # three rows in each of four parts of the batch
    assert "12x1xi32" in decode.lowered.as_text()
    prefill = serving_job(model, SERVING.model_copy(update=dict(step="prefill")), jax.devices()[:4])
    assert prefill.tokens == 4 * 512
    assert prefill.lasting == decode.lasting


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_experts_are_split_over_the_mesh_and_fp8_halves_them():
    model = load_model_config("cpu-tiny")
    of = {
        (dtype, ways): serving_job(
            model,
            SERVING.model_copy(update=dict(dtype=dtype, mesh={"expert": ways})),
            jax.devices()[:ways],
        ).lasting["weights"]
        for dtype in ("bfloat16", "fp8")
        for ways in (1, 4)
    }
    assert of["bfloat16", 4] < of["bfloat16", 1]
    assert of["fp8", 4] < 0.9 * of["bfloat16", 4]


def test_an_engine_without_rows_is_refused():
    with pytest.raises(UserError, match="rows is 0"):
        serving_job(
            load_model_config("cpu-tiny"),
            SERVING.model_copy(update=dict(rows=0)),
            jax.devices()[:4],
        )


def test_drafts_need_a_model_that_drafts():
    dense = load_model_config("cpu-tiny-qwen3")
    with pytest.raises(UserError, match="--drafts 1"):
        serving_job(dense, SERVING.model_copy(update=dict(drafts=1, mesh=None)), jax.devices()[:1])
