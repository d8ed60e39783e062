"""An account follows the compiled schedule: what is waited for, and what is hidden."""

import pytest

from dsjax.planning.chips import V5P
from dsjax.planning.costs import (
    COPIES,
    EXCHANGE,
    GATHERS,
    HOST,
    KERNEL_EFFICIENCY,
    MATMUL,
    REDUCTIONS,
    REST,
)
from dsjax.planning.kernels import OTHER
from tests.planning.programs import OPERAND, account_of, matmul

GATHERED = 64 * 8192 * 1024 * 2
"""Bytes of bf16[64,8192,1024]."""

GATHER_SECONDS = GATHERED * 63 / 64 / (6 * 100e9 * 0.9)
"""About 2 ms: each device of 64 gets what the others have, over six links."""

SMALL = "  %small = bf16[1,8192,1024]{2,1,0} parameter(1)"
GATHER = "bf16[64,8192,1024]{2,1,0} all-gather(%small), replica_groups={}, dimensions={0}"


def test_an_exchange_that_is_not_started_apart_is_waited_for():
    found = account_of("\n".join([OPERAND, SMALL, matmul("m", 3), f"  %g = {GATHER}"]))
    assert found.core[MATMUL] == pytest.approx(3e-3)
    assert found.waited[GATHERS] == pytest.approx(GATHER_SECONDS)
    assert found.seconds == pytest.approx(3e-3 + GATHER_SECONDS)
    assert found.sent[GATHERS] == GATHERED * 63 / 64


SPARSE = f"""\
%gather (small: bf16[1,8192,1024]) -> bf16[64,8192,1024] {{
  %small = bf16[1,8192,1024]{{2,1,0}} parameter(0)
  ROOT %inner = {GATHER}
}}, execution_thread="sparsecore"
"""


@pytest.mark.parametrize("milliseconds", [1, 3])
def test_what_runs_beside_the_core_is_hidden_behind_what_is_scheduled_between(milliseconds: int):
    """The three lines by which a sparse core is given work: room, begin, end."""
    found = account_of(
        "\n".join(
            [
                OPERAND,
                SMALL,
                '  %s = ((), u32[]) custom-call-start(), async_execution_thread="sparsecore", '
                "called_computations={%gather}",
                "  %u = ((bf16[1,8192,1024]), bf16[64,8192,1024]) custom-call-update(%s, %small)",
                matmul("m", milliseconds),
                "  %d = bf16[64,8192,1024]{2,1,0} custom-call-done(%u)",
            ]
        ),
        SPARSE,
    )
    waited = max(GATHER_SECONDS - milliseconds / 1000, 0)
    assert found.waited[GATHERS] == pytest.approx(waited)
    assert found.hidden[GATHERS] == pytest.approx(GATHER_SECONDS - waited)
    assert found.seconds == pytest.approx(milliseconds / 1000 + waited)


FUSED = f"""\
%begin (small: bf16[1,8192,1024]) -> (bf16[1,8192,1024], bf16[64,8192,1024]) {{
  %small = bf16[1,8192,1024]{{2,1,0}} parameter(0)
  %g = {GATHER}, channel_id=7
  ROOT %b = (bf16[1,8192,1024], bf16[64,8192,1024]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.1 (a: bf16[8,8], small: bf16[1,8192,1024]) -> bf16[8,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  %small = bf16[1,8192,1024]{{2,1,0}} parameter(1)
  %g = {GATHER}, channel_id=7
  ROOT %m = bf16[8,8]{{1,0}} convolution(%a, %a)
}}

%end (small: bf16[1,8192,1024]) -> bf16[64,8192,1024] {{
  %small = bf16[1,8192,1024]{{2,1,0}} parameter(0)
  %g = {GATHER}, channel_id=7
  ROOT %b = bf16[64,8192,1024]{{2,1,0}} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_matmul_fused_with_an_exchange_is_what_the_exchange_hides_behind():
    middle = matmul("m", 5).replace("convolution(%a, %a)", "fusion(%a, %small)")
    found = account_of(
        "\n".join(
            [
                OPERAND,
                SMALL,
                "  %s = (bf16[1,8192,1024], bf16[64,8192,1024]) fusion(%small), kind=kCustom, "
                "calls=%begin",
                f"{middle}, calls=%async_collective_fusion.1",
                "  %d = bf16[64,8192,1024]{2,1,0} fusion(%small), kind=kCustom, calls=%end",
            ]
        ),
        FUSED,
    )
    assert found.seconds == found.core[MATMUL] == pytest.approx(5e-3)
    assert found.hidden[GATHERS] == pytest.approx(GATHER_SECONDS)
    assert found.sent[GATHERS] == GATHERED * 63 / 64


def test_two_exchanges_share_the_links():
    lines = [OPERAND, SMALL]
    for name in "xy":
        lines.append(
            f"  %{name} = (bf16[1,8192,1024], bf16[64,8192,1024]) all-gather-start(%small), "
            "replica_groups={}, dimensions={0}"
        )
    lines += [f"  %{name}d = bf16[64,8192,1024] all-gather-done(%{name})" for name in "xy"]
    assert account_of("\n".join(lines)).seconds == pytest.approx(2 * GATHER_SECONDS)


def test_a_small_exchange_takes_its_half_of_the_links_beside_a_large_one():
    """It is done after twice its time, and the large one when all has passed."""
    begin = "  %x = (bf16[1,8192,1024], bf16[64,8192,1024]) all-gather-start(%small), "
    begin += "replica_groups={}, dimensions={0}"
    end = "  %xd = bf16[64,8192,1024] all-gather-done(%x)"
    few = "  %few = bf16[1,2048,1024]{2,1,0} parameter(2)"
    quarter = GATHER.replace("8192", "2048").replace("%small", "%few")
    found = account_of("\n".join([SMALL, few, begin, f"  %g = {quarter}", end]))
    assert found.each[GATHERS, "g"] == pytest.approx(2 / 4 * GATHER_SECONDS)
    assert found.seconds == pytest.approx(5 / 4 * GATHER_SECONDS)


def test_exchanges_along_different_axes_do_not_share_links():
    """And one along both goes as fast as the more crowded of them lets it."""

    def seconds(*groups: str) -> float:
        begins = (
            f"  %x{i} = (bf16[1,8192,1024], bf16[4,8192,1024]) all-gather-start(%small), "
            f"replica_groups={group}, dimensions={{0}}"
            for i, group in enumerate(groups)
        )
        ends = (f"  %d{i} = bf16[4,8192,1024] all-gather-done(%x{i})" for i in range(len(groups)))
        return account_of("\n".join([SMALL, *begins, *ends])).seconds

    first, second, plane = "{{0,1,2,3}}", "{{0,4,8,12}}", "{{0,1,4,5}}"
    along = seconds(first)
    assert seconds(first, second) == pytest.approx(along)
    assert seconds(first, first) == pytest.approx(2 * along)
    assert seconds(plane) == pytest.approx(along)  # two links that are a line's ends
    assert seconds(first, plane) == seconds(first, second, plane) == pytest.approx(2 * along)


def test_an_exchange_takes_the_links_that_rows_pass_on_their_way():
    line = "  %x = bf16[4,8192,1024] all-to-all(%b), replica_groups={{0,1,2,3}}"
    found = account_of(f"  %b = bf16[4,8192,1024]{{2,1,0}} parameter(0)\n{line}")
    sent = 4 * 8192 * 1024 * 2 * 3 / 4
    assert found.sent[EXCHANGE] == sent
    assert found.seconds == pytest.approx(sent * (1 + 2 + 1) / 3 / (2 * 100e9 * 0.9))


def test_a_sum_over_devices_passes_twice_and_a_scattered_one_once():
    whole = "  %r = bf16[64,8192,1024] all-reduce(%b), replica_groups={}, to_apply=%add"
    part = "  %r = bf16[1,8192,1024] reduce-scatter(%b), replica_groups={}, to_apply=%add"
    big = "  %b = bf16[64,8192,1024]{2,1,0} parameter(0)"
    add = "%add (x: bf16[], y: bf16[]) -> bf16[] {\n  ROOT %s = bf16[] parameter(0)\n}\n"
    twice, once = (account_of(f"{big}\n{line}", add).waited[REDUCTIONS] for line in (whole, part))
    assert once == pytest.approx(GATHER_SECONDS)
    assert twice == pytest.approx(2 * once)


def test_a_ragged_exchange_sends_the_rows_that_there_are_as_a_rule():
    def seconds(kind: str, scope: str) -> float:
        line = f'  %x = bf16[64,8192,1024] {kind}(%b), metadata={{op_name="jit(f)/{scope}{kind}"}}'
        return account_of(f"  %b = bf16[64,8192,1024]{{2,1,0}} parameter(0)\n{line}").seconds

    whole = seconds("ragged-all-to-all", "")
    assert seconds("ragged-all-to-all", "usual_rows_16/") == pytest.approx(whole / 4)
    assert seconds("ragged-all-to-all", "usual_rows_80/") == whole
    assert seconds("all-to-all", "usual_rows_16/") == seconds("all-to-all", "") == whole


LOOP = f"""\
%condition (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%body (p: (s32[])) -> (s32[]) {{
{OPERAND}
{matmul("m", 2)}
}}
"""


def test_a_loop_counts_as_often_as_it_runs():
    loop = "  %w = (s32[]) while(%t), condition=%condition, body=%body"
    begin = "  %zero = s32[] {}(0)\n  %t = (s32[]) tuple(%zero)"
    found = account_of(f"{begin.format('constant')}\n{loop}", LOOP)
    assert found.core[MATMUL] == pytest.approx(5 * 2e-3)
    assert not found.unknown
    once = account_of(f"{begin.format('parameter')}\n{loop}", LOOP)
    assert once.core[MATMUL] == pytest.approx(2e-3)
    assert once.unknown == {"loop w": 1}


def test_a_branch_costs_its_dearest_arm():
    arms = "".join(
        f"%{name} (a: bf16[8,8]) -> bf16[8,8] {{\n{OPERAND}\n{matmul('m' + name, cost)}\n}}\n"
        for name, cost in (("cheap", 1), ("dear", 4))
    )
    line = "  %c = bf16[8,8] conditional(%p, %a, %a), branch_computations={%cheap, %dear}"
    assert account_of(f"{OPERAND}\n  %p = s32[] parameter(1)\n{line}", arms).seconds == (
        pytest.approx(4e-3)
    )


def test_vector_work_takes_its_bytes_or_the_estimate_if_that_is_less():
    lines = [
        "  %b = f32[1024,1024]{1,0} parameter(0)",
        '  %x = f32[1024,1024]{1,0} add(%b, %b), backend_config={"estimated_cycles":"900000000"}',
        '  %y = f32[1024,1024]{1,0} add(%b, %b), backend_config={"estimated_cycles":"10"}',
        "  %z = f32[1024,1024]{0,1} copy(%b)",
    ]
    found = account_of("\n".join(lines))
    memory = 4 * 2**20 / (V5P.hbm * 0.8)
    assert found.core[REST] == pytest.approx(3 * memory + 10 / V5P.clock)
    assert found.core[COPIES] == pytest.approx(2 * memory)


def test_a_slice_that_is_brought_from_the_host_costs_what_it_moves():
    lines = [
        "  %h = bf16[58,1024,1024]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  %s = ((bf16[58,1024,1024]{2,1,0:S(5)}, s32[]), bf16[1,1024,1024]{2,1,0}, u32[]) "
        "dynamic-slice-start(%h, %i)",
        "  %d = bf16[1,1024,1024]{2,1,0} dynamic-slice-done(%s)",
    ]
    assert account_of("\n".join(lines)).waited[HOST] == pytest.approx(2 * 2**20 / V5P.host)


def test_a_copy_to_the_cores_own_memory_only_reads():
    lines = [
        "  %b = f32[1024,1024]{1,0} parameter(0)",
        "  %s = (f32[1024,1024]{1,0:S(1)}, f32[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%b)",
        "  %d = f32[1024,1024]{1,0:S(1)} copy-done(%s)",
    ]
    found = account_of("\n".join(lines))
    assert found.waited[COPIES] == pytest.approx(4 * 2**20 / (V5P.hbm * 0.8))


def test_a_kernel_takes_the_longer_of_its_operations_and_its_bytes():
    line = (
        '  %k = f32[8]{{0}} custom-call(), custom_call_target="tpu_custom_call", '
        'backend_config={{"cost_estimate":{{"flops":"{}","bytes_accessed":"{}"}}}}'
    )
    much = account_of(line.format(10**12, 10**6)).core[OTHER]
    wide = account_of(line.format(10**6, 10**12)).core[OTHER]
    assert much == pytest.approx(1e12 / (459e12 * KERNEL_EFFICIENCY))
    assert wide == pytest.approx(1e12 / (2765e9 * 0.8))
