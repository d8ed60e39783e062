"""Compiled programs of a few lines, in the words that XLA uses for TPUs."""

from dsjax.planning.account import Account, account
from dsjax.planning.chips import V5P, Slice, whole_slice
from dsjax.planning.hlo import Program, parse

CHIPS = whole_slice(V5P, (4, 4, 4))
"""A slice of 64 v5p chips."""

MILLISECOND = round(V5P.clock / 1000)
"""Cycles of a v5p."""


def program(body: str, others: str = "") -> Program:
    """A program whose entry computation has these lines; other computations stand before it."""
    text = (
        f"HloModule step, is_scheduled=true\n\n{others}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    )
    return parse(text.splitlines())


def account_of(body: str, others: str = "", chips: Slice = CHIPS) -> Account:
    """Its account."""
    return account(program(body, others), chips)


def matmul(name: str, milliseconds: float) -> str:
    """A line with a matmul that takes so long by the compiler's estimate."""
    cycles = round(milliseconds * MILLISECOND)
    return (
        f"  %{name} = bf16[8,8]{{1,0}} convolution(%a, %a), "
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


OPERAND = "  %a = bf16[8,8]{1,0} parameter(0)"
