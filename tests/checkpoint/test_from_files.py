import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.architecture import DeepSeekConfig
from dsjax.checkpoint.families import ROUTER_BIAS, Tensor, tensors
from dsjax.checkpoint.from_files import load_files
from dsjax.checkpoint.save import save
from dsjax.errors import UserError
from dsjax.model.layers import RouterBias, variable_axes, variables
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import Layout

Weights = dict[str, np.ndarray]
Write = Callable[..., Path]


def held(model: Transformer) -> dict[str, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in variables(model)}


def own(config: DeepSeekConfig) -> list[Tensor]:
    return [tensor for tensor in tensors(config) if not tensor.repeats]


def assert_holds(model: Transformer, weights: Weights, config: DeepSeekConfig) -> None:
    """Every number of the files, bit by bit, in its place, and nothing else."""
    arrays = held(model)
    for tensor in own(config):
        array = arrays[tensor.path][tensor.index]
        assert array.dtype == weights[tensor.name].dtype, tensor.name
        assert array.tobytes() == weights[tensor.name].tobytes(), tensor.name
    assert sum(array.size for array in arrays.values()) == sum(t.size for t in own(config))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_files(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("shards", [1, 3])
def test_float32_weights_are_held_bit_by_bit(
    write_folder: Write, weights: Weights, config: DeepSeekConfig, shards: int, capsys
) -> None:
    model = load_files(write_folder(weights, shards=shards))
    assert_holds(model, weights, config)
    assert model.config == config
    assert model.dtype == jnp.float32
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shards", [1, 3])
def test_bfloat16_weights_are_held_bit_by_bit(
    write_folder: Write, weights_bfloat16: Weights, config: DeepSeekConfig, shards: int
) -> None:
    model = load_files(write_folder(weights_bfloat16, shards=shards))
    assert_holds(model, weights_bfloat16, config)
    assert model.dtype == jnp.bfloat16


def test_float16_weights_are_held_bit_by_bit_and_computed_in_float32(
    write_folder: Write, weights: Weights, config: DeepSeekConfig, tmp_path: Path
) -> None:
    biases = {t.name for t in tensors(config) if t.kind == ROUTER_BIAS}
    half = {n: w if n in biases else w.astype(np.float16) for n, w in weights.items()}
    folder = write_folder(half)
    model = load_files(folder)
    assert_holds(model, half, config)
    assert model.dtype == jnp.float32
    tokens = jnp.arange(16)[None]
    wide = load_files(folder, dtype="float32")
    np.testing.assert_array_equal(model(tokens).logits, wide(tokens).logits)
    save(model, tmp_path / "saved", "hf")
    assert_holds(load_files(tmp_path / "saved"), half, config)


def test_a_given_dtype_casts_all_but_the_router_biases(
    write_folder: Write, weights: Weights
) -> None:
    folder = write_folder(weights)
    kept, cast = held(load_files(folder)), load_files(folder, dtype="bfloat16")
    assert cast.dtype == jnp.bfloat16
    for path, variable in variables(cast):
        expected = jnp.float32 if isinstance(variable, RouterBias) else jnp.bfloat16
        assert variable.dtype == expected, path
        assert np.array_equal(np.asarray(variable[...]), kept[path].astype(expected)), path


def test_a_dtype_that_holds_no_weights_is_refused(write_folder: Write, weights: Weights) -> None:
    with pytest.raises(UserError, match="dtype=int8: models compute in float32 or bfloat16"):
        load_files(write_folder(weights), dtype="int8")


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 2, "tensor": 2},
    ],
)
def test_eight_devices_hold_the_slices_that_the_layout_gives_them(
    write_folder: Write, weights: Weights, config: DeepSeekConfig, sizes: dict[str, int]
) -> None:
    layout = Layout(make_mesh(sizes))
    model = load_files(write_folder(weights), layout=layout)
    assert_holds(model, weights, config)
    for path, variable in variables(model):
        array = variable[...]
        assert array.sharding == layout.sharding(variable_axes(variable), array.shape), path
        assert len(array.addressable_shards) == 8
        whole = np.asarray(array)
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), whole[shard.index]), path


def test_the_loaded_model_runs(write_folder: Write, weights: Weights) -> None:
    logits = load_files(write_folder(weights))(jnp.arange(16)[None]).logits
    assert logits.shape == (1, 16, 48)
    assert jnp.isfinite(logits).all()


def test_a_model_of_other_parts_is_loaded_too(
    write_folder: Write, config: DeepSeekConfig, config_json: dict
) -> None:
    change = {
        "q_lora_rank": None,
        "n_shared_experts": 0,
        "first_k_dense_replace": 0,
        "topk_method": "group_limited_greedy",
        "num_nextn_predict_layers": 2,
    }
    config = config.model_copy(update=change)
    rng = np.random.default_rng(1)
    weights = {t.name: rng.normal(size=t.shape).astype(np.float32) for t in own(config)}
    weights |= {t.name: weights[t.repeats] for t in tensors(config) if t.repeats}
    model = load_files(write_folder(weights, config=config_json | change))
    assert model.dense_layers is None
    assert_holds(model, weights, config)


def test_loading_holds_one_parameter_beside_the_model(
    write_folder: Write, config: DeepSeekConfig, config_json: dict
) -> None:
    change = {"vocab_size": 8192, "hidden_size": 64, "n_routed_experts": 32}
    config = config.model_copy(update=change)
    weights = {t.name: np.ones(t.shape, np.float32) for t in own(config)}
    weights |= {t.name: weights[t.repeats] for t in tensors(config) if t.repeats}
    folder = write_folder(weights, config=config_json | change)
    load_files(folder)  # What is imported and traced once is not what is measured.
    size = sum(4 * tensor.size for tensor in own(config))
    largest = max(weight.nbytes for weight in weights.values())
    del weights
    tracemalloc.start()
    try:
        model = load_files(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size <= peak < size + largest + 2_000_000
    assert model.config == config


def test_a_folder_without_mtp_tensors_loads_without_mtp_and_says_so(
    write_folder: Write, weights: Weights, config: DeepSeekConfig, capsys
) -> None:
    main = {name: w for name, w in weights.items() if not name.startswith("model.layers.3.")}
    folder = write_folder(main)
    model = load_files(folder)
    said = capsys.readouterr().err
    assert said == f"{folder}: config.json promises MTP layers, but the files hold none\n"
    assert model.mtp is None
    assert model.config == config.model_copy(update={"num_nextn_predict_layers": 0})
    assert_holds(model, main, model.config)


@pytest.mark.parametrize("half", [slice(None, None, 2), slice(1, None), slice(-1, None)])
def test_a_folder_with_some_mtp_tensors_is_broken(
    write_folder: Write, weights: Weights, half: slice
) -> None:
    ahead = [name for name in weights if name.startswith("model.layers.3.")]
    kept = set(weights) - set(ahead) | set(ahead[half])
    message = refusal(write_folder({name: weights[name] for name in weights if name in kept}))
    copies = ("embed_tokens.weight", "shared_head.head.weight")  # these follow from the rest
    missing = [name for name in set(weights) - kept if not name.endswith(copies)]
    assert f"{len(missing)} missing (model.layers.3." in message


def test_a_repeat_that_differs_is_refused(write_folder: Write, weights: Weights) -> None:
    name = "model.layers.3.shared_head.head.weight"
    weights[name] = weights[name].copy()
    weights[name][-1, -1] += 1
    assert f"{name} differs from lm_head.weight" in refusal(write_folder(weights))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.3.eh_proj.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    write_folder: Write, weights: Weights, name: str, bad: float
) -> None:
    weights[name].flat[-1] = bad
    assert f"{name} holds NaN or infinity" in refusal(write_folder(weights, shards=2))


def test_missing_surplus_and_misshaped_tensors_are_refused(
    write_folder: Write, weights: Weights
) -> None:
    weights["surplus"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"].T.copy()
    message = refusal(write_folder(weights))
    assert "1 missing (model.norm.weight); 1 unknown (surplus); 1 misshaped (lm_head" in message


def test_weights_that_are_no_numbers_of_ours_are_refused(
    write_folder: Write, weights: Weights
) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float64)
    assert "is stored as F64; expected F32 or BF16 or F16" in refusal(write_folder(weights))


def test_a_stack_stored_in_two_dtypes_needs_one_chosen(
    write_folder: Write, weights: Weights
) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    weights[name] = weights[name].astype(ml_dtypes.bfloat16)
    folder = write_folder(weights)
    message = refusal(folder)
    assert name in message
    assert "choose one by dtype=" in message
    load_files(folder, dtype="float32")


def test_parameters_stored_apart_keep_their_own_dtypes(
    write_folder: Write, weights_bfloat16: Weights, config: DeepSeekConfig
) -> None:
    for name in ("model.norm.weight", "model.layers.3.enorm.weight"):
        weights_bfloat16[name] = weights_bfloat16[name].astype(np.float32)
    assert_holds(load_files(write_folder(weights_bfloat16)), weights_bfloat16, config)
