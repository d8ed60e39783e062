"""A model in FP8 computes what its numbers mean, bit by bit, and moves none of them for it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import numpy_model

from dsjax.checkpoint.from_files import load_files
from dsjax.checkpoint.load import load_decoder
from dsjax.kernels.paged_attention import places_of
from dsjax.model.decoder import Decoder, make_pages, take_apart
from dsjax.model.layers import BlockScale, Linear, put_columns_first, scale_of, use, variables
from dsjax.model.transformer import Transformer
from sharding.mesh import make_mesh
from sharding.rules import DECODE_RULES, Layout, use_layout
from tests.checkpoint.released_folders import BLOCKS, Weights, write_released
from tests.numerics.definition import BLOCKS as SIDES
from tests.numerics.definition import dequantize

from .conftest import LENGTH, ROWS, forward, off, random_tokens

EXACT = 1e-5
COLLECTIVE = r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of several blocks, most with partial ones at their edges."""
    return tmp_path_factory.mktemp("fp8") / "hf"


@pytest.fixture(scope="module")
def stored(folder: Path) -> Weights:
    return write_released(folder, BLOCKS, "F8_E4M3")


@pytest.fixture(scope="module")
def held(folder: Path, stored: Weights) -> Transformer:
    return load_files(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def both(request: pytest.FixtureRequest, folder: Path, held: Transformer) -> list[Transformer]:
    """The model in FP8 and the one that was widened while it was read, computing in one dtype."""
    wide = load_files(folder, request.param)
    kept = jax.tree.map(lambda array: array, held)
    kept.dtype = wide.dtype
    return [kept, wide]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return random_tokens(BLOCKS, (ROWS, LENGTH))


def test_it_says_what_plain_numpy_says(
    stored: Weights, held: Transformer, tokens: np.ndarray
) -> None:
    """The files, widened by the format's definition, in the model written from the papers."""
    meant = {name: value.astype(np.float32) for name, value in stored.items()}
    for name in stored:
        if (scale := f"{name}_scale_inv") in stored:
            meant[name] = dequantize(stored[name].view(np.uint8), stored[scale], SIDES)
    model = jax.tree.map(lambda array: array, held)
    model.dtype = jnp.dtype(jnp.float32)
    found = forward(model, jnp.asarray(tokens))
    plain, places = BLOCKS.model_dump(), np.arange(LENGTH)
    expected = [numpy_model.run(plain, meant, row, places) for row in tokens]
    assert off(found.logits, [row.logits for row in expected]) < EXACT
    assert off(found.mtp_logits[0][:, :-1], [row.mtp_logits[0] for row in expected]) < EXACT


def test_every_output_is_bitwise_that_of_the_widened_model(
    both: list[Transformer], tokens: np.ndarray
) -> None:
    found, expected = (jax.tree.leaves(forward(model, jnp.asarray(tokens))) for model in both)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()


@pytest.mark.usefixtures("thorough_compiler")
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_heads_and_edges_are_widened_before_a_product_as_the_definition_says(
    dtype: Any, inputs_first: bool
) -> None:
    """Blocks of the released rows, 7 heads of 44 numbers, do not end where heads do."""
    rng = np.random.default_rng(0)
    out, into = {"heads": 7, "head_dim": 44}, {"kv_lora": 132}
    layer = Linear(jax.random.key(0), out, into, std=1.0, dtype=jnp.dtype(jnp.float32))
    raw = rng.integers(0, 0x7F, (308, 132)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (3, 2)).astype(np.float32)
    layer.weight.set_value(jnp.asarray(raw).view(jnp.float8_e4m3fn).reshape(7, 44, 132))
    layer.weight_scale = BlockScale(jnp.asarray(scales), axes=("block", "block"), merged=(2, 1))
    if inputs_first:
        layer.put_inputs_first()
    x = jnp.asarray(rng.normal(size=(3, 132)), dtype)
    wide = jnp.asarray(dequantize(raw, scales, SIDES), dtype).reshape(7, 44, 132)
    plain = Linear(jax.random.key(0), out, into, std=1.0, dtype=jnp.dtype(dtype))
    plain.weight.set_value(wide)
    if inputs_first:
        plain.put_inputs_first()
    assert (use(layer.weight, dtype, layer.weight_scale) == plain.weight[...]).all()
    run = jax.jit(lambda layer, x: layer(x))
    assert (run(layer, x) == run(plain, x)).all()


def test_turning_a_weight_turns_its_scales_and_their_names(held: Transformer) -> None:
    experts = jax.tree.map(lambda array: array[0], held.moe_layers).ffn.experts
    before = use(experts.gate, jnp.float32, scale_of(experts, "gate"))
    put_columns_first(experts, "gate")
    scale = scale_of(experts, "gate")
    assert isinstance(scale, BlockScale)
    assert scale.get_metadata("axes") == ("expert", "block", "block")
    assert experts.gate.get_metadata("axes") == ("expert", "expert_input", "expert_mlp_rows")
    assert (use(experts.gate, jnp.float32, scale) == before.swapaxes(1, 2)).all()


def test_a_decoder_keeps_fp8_but_for_what_is_cut_by_head(held: Transformer) -> None:
    decoder = take_apart(held)
    kinds = {path: str(variable.dtype) for path, variable in variables(decoder)}
    matrices = {path.split(".")[-2] for path, kind in kinds.items() if kind == "float8_e4m3fn"}
    assert matrices == {"q_a", "q_b", "kv_a", "out", "gate", "up", "down", "experts"}
    cut = {kind for path, kind in kinds.items() if path.endswith((".k_b", ".v_b"))}
    assert cut == {"bfloat16"}


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_a_decoder_that_is_loaded_is_the_model_taken_apart(
    folder: Path, sizes: dict[str, int] | None
) -> None:
    """Bit by bit and place by place, though it comes a layer at a time."""
    mesh = None if sizes is None else make_mesh(sizes)
    layout = mesh and Layout(mesh, DECODE_RULES)
    with contextlib.nullcontext() if layout is None else use_layout(layout):
        expected = take_apart(load_files(folder, layout=layout))
    found = load_decoder(folder, mesh=mesh)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, one), (_, other) in zip(variables(found), variables(expected), strict=True):
        a, b = one[...], other[...]
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
        assert np.array_equal(np.asarray(a), np.asarray(b)), path


def test_decoding_is_bitwise_that_of_the_widened_model(
    folder: Path, held: Transformer, tokens: np.ndarray
) -> None:
    @jax.jit
    def extend(decoder: Decoder, pages: Any, begin: int, part: np.ndarray) -> Any:
        places = places_of(
            jnp.full(ROWS, begin),
            jnp.full(ROWS, 12),
            jnp.arange(2 * ROWS).reshape(ROWS, 2),
            queries=12,
            pages=2 * ROWS,
            page_size=16,
        )
        hidden, pages, _ = decoder.extend(jnp.asarray(part), pages, places)
        return decoder.logits(hidden[:, -1]), pages

    found = []
    for model in (held, load_files(folder, "bfloat16")):
        decoder = take_apart(model)
        pages = make_pages(BLOCKS, 1, 2 * ROWS, 16, model.dtype, mtp=False)
        first, pages = extend(decoder, pages, 0, tokens[:, :12])
        found.append((first, extend(decoder, pages, 12, tokens[:, 12:24])[0]))
    for one, other in zip(*found, strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"tensor": 8}])
def test_widening_on_a_mesh_is_every_devices_own_work(
    folder: Path, held: Transformer, sizes: dict[str, int]
) -> None:
    """Whichever dimension is cut, within a block or not: the compiled program moves nothing."""
    model = load_files(folder, layout=Layout(make_mesh(sizes)))
    found = dict(variables(model))
    weights = {path: found[f"{path}_scale"] for path in found if f"{path}_scale" in found}
    assert len(weights) > 20

    @jax.jit
    def widen(model: Transformer) -> dict[str, jax.Array]:
        all_of_it: Any = dict(variables(model))
        return {
            path: use(all_of_it[path], "bfloat16", all_of_it[f"{path}_scale"]) for path in weights
        }

    program = widen.lower(model).compile()
    assert not re.findall(COLLECTIVE, program.as_text())
    alone = widen(held)
    for path, wide in program(model).items():
        assert wide.sharding.is_equivalent_to(found[path][...].sharding, wide.ndim), path
        assert np.array_equal(np.asarray(wide), np.asarray(alone[path])), path


def test_eight_devices_say_of_fp8_what_they_say_of_the_widened_model(
    folder: Path, held: Transformer, tokens: np.ndarray
) -> None:
    layout = Layout(make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}))
    batch = jnp.asarray(np.concatenate([tokens, tokens]))
    with use_layout(layout):
        run = jax.jit(lambda model: model(batch).logits)
        found, expected = (run(load_files(folder, dtype, layout)) for dtype in (None, "bfloat16"))
    assert (found == expected).all()
