"""Reading compiled programs: lines, shapes, layouts, groups, trips."""

from collections.abc import Sequence

import pytest

from dsjax.errors import UserError
from dsjax.planning.chips import V5P, parse_topology, whole_slice
from dsjax.planning.groups import first_group
from dsjax.planning.hlo import arrays, hbm_bytes, nbytes, parse
from dsjax.planning.loops import trips
from tests.planning.programs import program


def test_a_line_that_xla_broke_inside_an_attribute_is_one_instruction():
    found = program(
        "  %a = f32[2]{0} parameter(0)\n"
        "  ROOT %k = (f32[2]{0}, /*index=1*/s32[]) custom-call(%a, /*index=1*/%a), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"block_q": 512\n'
        '}}, metadata={op_name="jit(step)"}'
    )
    kernel = found.computations["main"]["k"]
    assert kernel.operands == ("a", "a")
    assert kernel.opcode == "custom-call"
    assert '"block_q": 512' in kernel.attributes
    assert kernel.value("op_name") == "jit"


def test_computations_of_other_cores_end_where_they_end():
    found = program(
        "  ROOT %a = f32[] parameter(0)",
        '%sparse (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}, execution_thread="sc"\n',
    )
    assert list(found.computations) == ["sparse", "main"]
    assert list(found.computations["main"]) == ["a"]


@pytest.mark.parametrize("text", ["", "ENTRY %main () -> f32[] {\n}", "HloModule step\n"])
def test_what_is_no_compiled_program_is_refused_in_one_line(text: str):
    with pytest.raises(UserError, match="no compiled program"):
        parse(text.splitlines())


def test_an_estimate_that_means_unknown_is_none():
    line = '  %a = f32[] add(%b, %b), backend_config={{"estimated_cycles":"{}"}}'
    known = program(line.format(100)).computations["main"]["a"]
    unknown = program(line.format(2**63 - 1)).computations["main"]["a"]
    assert (known.cycles, unknown.cycles) == (100, None)


def test_bytes_of_shapes_and_of_their_tiles():
    assert arrays("(bf16[2,3]{1,0}, pred[])") == [("bf16", (2, 3)), ("pred", ())]
    assert nbytes("(bf16[2,3]{1,0}, s4[8], f8e4m3fn[5], pred[])") == 12 + 4 + 5 + 1
    # 14 of 128 lanes are used; what lies in the core's own memory is not in HBM.
    assert hbm_bytes("bf16[16,14]{1,0:T(8,128)(2,1)}") == 16 * 128 * 2
    assert hbm_bytes("bf16[14,16]{0,1:T(8,128)(2,1)}") == 16 * 128 * 2
    assert hbm_bytes("(f32[3]{0}, s8[2,2]{1,0:T(4,128)(4,1)S(1)})") == 12


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={1}", [0, 2]),
        ("replica_groups=[2,2]<=[4], dimensions={1}", [0, 1]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={1}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, use_global_device_ids=true", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups={}, to_apply=%add", [0, 1, 2, 3]),
        ("source_target_pairs={{0,3},{3,0}}", [0, 3]),
    ],
)
def test_all_ways_of_writing_groups(attributes: str, group: list[int]):
    assert first_group(attributes, 4) == group


def test_links_are_those_of_the_axes_that_a_group_spans():
    chips = whole_slice(V5P, (4, 4, 8))
    assert chips.places[1] == (1, 0, 0)
    assert chips.links(range(4), alike=True) == 2  # a ring along the first axis
    assert chips.links(range(2), alike=True) == 1  # a part of it is a line
    assert chips.links(range(16), alike=True) == 4
    assert chips.links(range(128), alike=True) == 6


def test_devices_of_one_chip_share_its_links_unless_what_comes_is_for_both():
    chips = whole_slice(*parse_topology("tpu7x:4x4x4"))
    assert chips.places[0] == chips.places[1]
    assert chips.links(range(128), alike=True) == 6
    assert chips.links(range(0, 128, 2), alike=True) == 3
    assert chips.links(range(128), alike=False) == 3


@pytest.mark.parametrize(
    ("slice_", "devices", "hops"),
    [
        ("v5p:8x8x8", range(8), (1 + 2 + 3 + 4 + 3 + 2 + 1) / 7),  # a ring
        ("v5p:4x4x4", [0, 1, 4, 5], (1 + 1 + 2) / 3),  # lines along two axes
        ("v5p:4x4x4", [0, 1, 2], (3 + 2 + 3) / 6),  # a line, from each of its places
        ("tpu7x:4x4x4", range(8), (0 + 1 + 1 + 2 + 2 + 1 + 1) / 7),  # two on a chip
        ("v5p:4x4x4", [5], 1),  # XLA writes groups of one, too
        ("tpu7x:4x4x4", range(2), 1),  # nothing is known of the way within a chip
    ],
)
def test_hops_are_those_to_the_other_devices(slice_: str, devices: Sequence[int], hops: float):
    found = whole_slice(*parse_topology(slice_)).hops(devices)
    assert found == pytest.approx(max(hops, 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v9:4x4", "there are v5e, v5p, tpu7x"),
        ("v5p:4x4", "expected 3 sizes for v5p, as in v5p:4x4x4"),
        ("v5e:4xmany", "expected 2 sizes"),
        ("v5e", "expected 2 sizes"),
        ("v5e:0x4", "expected 2 sizes"),
    ],
)
def test_a_topology_of_nonsense_is_refused_in_one_line(text: str, says: str):
    with pytest.raises(UserError, match=says):
        parse_topology(text)


CONDITION = """\
%condition (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] LIMIT
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
"""


@pytest.mark.parametrize(
    ("limit", "attributes", "expected"),
    [
        ("constant(58)", "", 57),
        ("get-tuple-element(%p), index=1", "", 9),
        ("get-tuple-element(%p), index=1", ', backend_config={"known_trip_count":{"n":"7"}}', 7),
        ("custom-call()", "", None),
        ("custom-call()", ', metadata={op_name="jit(f)/jvp(usual_turns_16)/while"}', 16),
        ("custom-call()", ', metadata={op_name="jit(f)/usual_turns_0/while/body/while"}', None),
    ],
)
def test_trips_are_read_from_the_condition_of_a_loop(
    limit: str, attributes: str, expected: int | None
):
    found = program(
        "  %one = s32[] constant(1)\n"
        "  %ten = s32[] constant(10)\n"
        "  %copied = s32[] copy(%ten)\n"
        "  %carried = (s32[], s32[]) tuple(%one, %copied)\n"
        f"  %loop = (s32[], s32[]) while(%carried), condition=%condition, body=%body{attributes}",
        CONDITION.replace("LIMIT", limit),
    )
    scope = found.computations["main"]
    assert trips(found, scope["loop"], scope) == expected
