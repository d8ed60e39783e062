"""Pallas kernels are counted from what they do, not from what they say of it."""

import pytest

from dsjax.planning.chips import TPU7X, V5P
from dsjax.planning.kernels import ATTENTION, GROUPED, OTHER, Work, work
from tests.planning.programs import program


def call(name: str, result: str, operands: list[str], attributes: str = "") -> Work:
    lines = [f"  %a{place} = {shape} parameter({place})" for place, shape in enumerate(operands)]
    names = ", ".join(f"%a{place}" for place in range(len(operands)))
    lines.append(
        f"  %{name} = {result} custom-call({names}), "
        f'custom_call_target="tpu_custom_call"{attributes}'
    )
    kernel = program("\n".join(lines)).computations["main"][name]
    return work(kernel, operands, V5P)


GRID = ["s32[9]{0}", "s32[11]{0}", "s32[11]{0}", "s32[1]{0}"]
"""Of 8 groups: 4 tiles of rows are visited 11 times, once more for each border between groups."""


NARROW, WIDE, STACK = "bf16[512,32]{1,0}", "bf16[512,64]{1,0}", "bf16[8,32,64]{2,1,0}"


@pytest.mark.parametrize(
    ("result", "operands", "products"),
    [
        (WIDE, [NARROW, STACK], 1),
        (NARROW, [WIDE, STACK], 1),
        (NARROW, [WIDE, STACK, WIDE, STACK], 2),
        (STACK, [NARROW, WIDE], 1),
        (STACK, [NARROW, WIDE, STACK], 1),
    ],
)
def test_a_grouped_matmul_pays_for_tiles_that_it_reads_again(
    result: str, operands: list[str], products: int
):
    found = call("gmm", result, [*GRID, *operands])
    assert found.kind == GROUPED
    assert found.flops == products * 2 * 512 * 32 * 64 * 11 / 4


def test_rows_that_only_have_room_are_not_multiplied():
    """Of 4 tiles there are 2 as a rule, and a visit more for each border between 8 groups."""
    said = ', metadata={op_name="jit(f)/jvp(usual_rows_256)/grouped_matmul/pallas_call"}'
    found = call("grouped_matmul", WIDE, [*GRID, NARROW, STACK], said)
    assert found.flops == 2 * 256 * 32 * 64 * 9 / 2
    more = call("grouped_matmul", WIDE, [*GRID, NARROW, STACK], said.replace("256", "1000"))
    assert more == call("grouped_matmul", WIDE, [*GRID, NARROW, STACK])


QKV = [f"bf16[2,16,1024,{width}]{{3,2,1,0}}" for width in (192, 192, 128)]
SCORES = 2 * 16 * 1024 * 1024


@pytest.mark.parametrize(
    ("name", "result", "products"),
    [
        ("splash_mha_fwd", "bf16[2,16,1024,128]", 256 + 128),
        ("splash_mha_dq", "bf16[2,16,1024,192]", 256 + 128 + 256),
        ("splash_mha_dkv", "(bf16[2,16,1024,192], bf16[2,16,1024,128])", 2 * 256 + 2 * 128),
        (
            "splash_mha_dkv",
            "(bf16[2,16,1024,192], bf16[2,16,1024,192], bf16[2,16,1024,128])",
            3 * 256 + 2 * 128,
        ),
    ],
)
def test_attention_pays_for_whole_blocks_and_whole_units(name: str, result: str, products: int):
    blocks = "".join(rf"\"block_q{side}\": 256, " for side in ("", "_dq", "_dkv"))
    found = call(name, result, QKV, f', frontend_attributes={{kernel_metadata={{"x":"{blocks}"}}}}')
    assert found.kind == ATTENTION
    assert found.flops == 2 * SCORES * products * 10 / 16  # of 4 x 4 blocks, 10 are not masked


def test_a_wider_matrix_unit_wastes_more_on_a_narrow_head():
    shapes = [shape.replace("192", "128") for shape in QKV]
    kernel = program(
        '  %mha = bf16[2,16,1024,128] custom-call(), custom_call_target="tpu_custom_call"'
    ).computations["main"]["mha"]
    assert work(kernel, shapes, TPU7X).flops == 2 * work(kernel, shapes, V5P).flops


def test_a_cost_estimate_is_believed_only_with_bytes():
    said = ', backend_config={"cost_estimate":{"flops":"4000","bytes_accessed":"%d"}}'
    assert call("own", "f32[4]{0}", ["f32[4]{0}"], said % 800) == Work(OTHER, 4000, 800, told=True)
    assert call("own", "f32[4]{0}", ["f32[4]{0}"], said % 0) == Work(OTHER, 0, 32)
    # One that says it moves numbers, and no operations, multiplies nothing: that is no doubt.
    moves = said.replace("4000", "0") % 800
    assert call("own", "f32[4]{0}", ["f32[4]{0}"], moves).told
    hint = call("flash_attention", "bf16[2,16,1024,128]", QKV, said % 0)
    assert hint.flops == 2 * SCORES * (256 + 128) / 2


def test_short_numbers_count_as_such_where_a_chip_multiplies_them():
    kernel = program(
        '  %k = bf16[8,8] custom-call(), custom_call_target="tpu_custom_call"'
    ).computations["main"]["k"]
    both, one = ["f8e4m3fn[8,8]", "f8e4m3fn[8,8]"], ["f8e4m3fn[8,8]", "bf16[8,8]"]
    assert work(kernel, both, TPU7X).numbers == "fp8"
    assert work(kernel, one, TPU7X).numbers == work(kernel, both, V5P).numbers == "bf16"
    assert work(kernel, ["s8[8,8]", "s8[8,8]"], V5P).numbers == "int8"
