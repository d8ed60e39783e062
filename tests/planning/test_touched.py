"""Bytes that an instruction moves: all of its operands, or the part that it takes or puts."""

import pytest

from dsjax.planning.touched import touched_bytes
from tests.planning.programs import program

LARGE, PART, INDEX = "f32[1024,128]{1,0}", "f32[8,128]{1,0}", "s32[]"
NEAR = "f32[8,128]{1,0:S(1)}"
BYTES = {LARGE: 1024 * 128 * 4, PART: 8 * 128 * 4, INDEX: 4}

GATHERED = f"""
%inside (a: {LARGE}, i: s32[8]) -> {PART} {{
  %a = {LARGE} parameter(0)
  %i = s32[8]{{0}} parameter(1)
  ROOT %g = {PART} gather(%a, %i), slice_sizes={{1,128}}
}}
"""
PUT = f"""
%inside (a: {LARGE}, b: {PART}, i: {INDEX}) -> {LARGE} {{
  %a = {LARGE} parameter(0)
  %b = {PART} parameter(1)
  %i = {INDEX} parameter(2)
  %twice = {PART} add(%b, %b)
  ROOT %put = {LARGE} dynamic-update-slice(%a, %twice, %i, %i)
}}
"""
SCATTERED = f"""
%inside (a: {LARGE}, i: s32[8], b: {PART}) -> {LARGE} {{
  %a = {LARGE} parameter(0)
  %i = s32[8]{{0}} parameter(1)
  %b = {PART} parameter(2)
  ROOT %put = {LARGE} scatter(%a, %i, %b), to_apply=%take_new
}}
"""
USED_TWICE = f"""
%inside (a: {LARGE}, i: {INDEX}) -> ({PART}, {LARGE}) {{
  %a = {LARGE} parameter(0)
  %i = {INDEX} parameter(1)
  %part = {PART} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={{8,128}}
  %all = {LARGE} negate(%a)
  ROOT %both = ({PART}, {LARGE}) tuple(%part, %all)
}}
"""


@pytest.mark.parametrize(
    ("inside", "result", "operands", "expected"),
    [
        ("", f"{LARGE} add(%a0, %a1)", [LARGE, LARGE], 3 * BYTES[LARGE]),
        ("", f"{PART} dynamic-slice(%a0, %a1, %a1)", [LARGE, INDEX], 2 * BYTES[PART]),
        (
            "",
            f"{LARGE} dynamic-update-slice(%a0, %a1, %a2, %a2)",
            [LARGE, PART, INDEX],
            2 * BYTES[PART],
        ),
        (
            GATHERED,
            f"{PART} fusion(%a0, %a1), kind=kLoop, calls=%inside",
            [LARGE, "s32[8]{0}"],
            2 * BYTES[PART] + 8 * 4,
        ),
        (
            PUT,
            f"{LARGE} fusion(%a0, %a1, %a2), kind=kLoop, calls=%inside",
            [LARGE, PART, INDEX],
            3 * BYTES[PART] + BYTES[INDEX],
        ),
        (
            SCATTERED,
            f"{LARGE} fusion(%a0, %a1, %a2), kind=kCustom, calls=%inside",
            [LARGE, "s32[8]{0}", PART],
            3 * BYTES[PART] + 8 * 4,
        ),
        (
            "",
            f"(({LARGE}), {NEAR}, {INDEX}{{:S(2)}}) slice-start(%a0), slice={{[0:8]}}",
            [LARGE],
            BYTES[PART],
        ),
        (
            USED_TWICE,
            f"({PART}, {LARGE}) fusion(%a0, %a1), kind=kLoop, calls=%inside",
            [LARGE, INDEX],
            2 * BYTES[LARGE] + BYTES[PART] + BYTES[INDEX],
        ),
    ],
)
def test_a_part_is_counted_as_that(
    inside: str, result: str, operands: list[str], expected: float
) -> None:
    lines = [f"  %a{place} = {shape} parameter({place})" for place, shape in enumerate(operands)]
    found = program("\n".join([*lines, f"  %it = {result}"]), inside)
    assert touched_bytes(found, found.computations["main"]["it"], operands) == expected
