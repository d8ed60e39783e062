"""Compile one layer of V3's experts for TPUs that are not there, forward and backward.

    pip install -e '.[plan]'
    python benchmarks/expert_layer.py --topology v5p:2x2x1 --tokens 12288 --hlo layer.txt
    python benchmarks/expert_layer.py --topology v5p:2x2x2 --travel

For one device, with 32 experts; or for all of the slice with 32 each, and tokens travel. Prints
temporaries, the account of `dsjax plan`, its dearest instructions, and for each kernel what the
compiler was told of its operations and bytes. docs/performance.md has what was found.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from dsjax.cli import run
from dsjax.cli_plan import describe_host

EXPERTS, CHOICES, EMBED, WIDTH = 32, 8, 7168, 2048
GROUPS, CHOSEN = 8, 4
"""Of all experts, and how many of them a token reaches."""


def main() -> None:
    """Compile, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="such as v5p:2x2x1")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--travel", action="store_true", help="tokens travel over the slice")
    parser.add_argument("--hlo", type=Path, help="where to write the compiled program")
    parser.add_argument("--dearest", type=int, default=20, help="instructions to show")
    arguments = parser.parse_args()
    describe_host(arguments.topology)

    from dsjax.planning.compile import described_devices

    devices = described_devices(arguments.topology)
    devices = devices if arguments.travel else devices[:1]
    lower = _lower_travelling if arguments.travel else _lower
    began = time.perf_counter()
    program = lower(devices, arguments.tokens).compile()
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    print(f"temporaries {program.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB")
    text = program.as_text()
    if arguments.hlo:
        arguments.hlo.write_text(text)
    told = r'%(\w+?)[.\d]* = .*"flops":"(\d+)".*?"bytes_accessed":"(\d+)"'
    for name, flops, moved in re.findall(told, text):
        print(f"{name}: {int(flops) / 1e12:.2f} TFLOP, {int(moved) / 1e9:.1f} GB")
    _account(text, devices, arguments)


def _account(text: str, devices: Any, arguments: argparse.Namespace) -> None:
    from dsjax.planning.account import account
    from dsjax.planning.chips import Slice, parse_topology
    from dsjax.planning.costs import KINDS
    from dsjax.planning.hlo import parse

    program = parse(text.splitlines())
    chip, shape = parse_topology(arguments.topology)
    places = tuple(tuple(device.coords)[: chip.axes] for device in devices)
    found = account(program, Slice(chip, shape, places))
    for kind in KINDS:
        print(f"{1e3 * (found.core[kind] + found.waited[kind]):8.2f} ms  {kind}")
    print(f"{1e3 * found.seconds:8.2f} ms  in all")
    shapes = {each.name: each.shape for c in program.computations.values() for each in c.values()}
    dearest = sorted(found.each.items(), key=lambda item: -item[1])
    for (kind, name), seconds in dearest[: arguments.dearest]:
        print(f"{1e3 * seconds:8.2f} ms  {kind}: {name} {shapes.get(name, '')[:60]}")


def _lower(devices: Any, tokens: int) -> Any:
    import jax
    import jax.numpy as jnp

    from dsjax.kernels import experts
    from dsjax.kernels.permutation import sort_by_expert

    def layer(x: Any, weights: Any, chosen: Any, gates: Any, dy: Any, into: Any) -> Any:
        order = sort_by_expert(chosen, EXPERTS)
        gates = gates.ravel()[order.pair_of_row]
        y, before = experts.multiply(x, weights, order, gates)
        return y, experts.multiply_gradient(x, weights, order, gates, before, dy, into, jnp.float32)

    place = jax.sharding.SingleDeviceSharding(devices[0])
    into = _stacks(EXPERTS, place, jnp.float32)
    return jax.jit(layer, donate_argnums=5).lower(*_arguments(1, tokens, place), into)


def _lower_travelling(devices: Any, tokens: int) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from dsjax.kernels.experts_parallel import routed_experts_over
    from dsjax.model.moe import devices_in_reach

    count = len(devices)
    reach = devices_in_reach(GROUPS, CHOSEN, count)

    def layer(x: Any, weights: Any, chosen: Any, gates: Any, dy: Any) -> Any:
        def forward(x: Any, weights: Any, gates: Any) -> Any:
            return routed_experts_over("expert", reach, x, weights, chosen, gates)

        y, pull = jax.vjp(forward, x, weights, gates)
        return y, pull(dy)

    mesh, spec = Mesh(np.array(devices), "expert"), PartitionSpec("expert")
    step = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(step).lower(*_arguments(count, tokens, NamedSharding(mesh, spec)))


def _arguments(count: int, tokens: int, place: Any) -> tuple[Any, ...]:
    """x, weights, experts, gates and the gradient of y, of so many devices together."""
    import jax.numpy as jnp

    rows = _shape((count * tokens, EMBED), place, jnp.bfloat16)
    pairs = count * tokens, CHOICES
    return (
        rows,
        _stacks(count * EXPERTS, place, jnp.bfloat16),
        _shape(pairs, place, jnp.int32),
        _shape(pairs, place, jnp.float32),
        rows,
    )


def _stacks(experts: int, place: Any, dtype: Any) -> Any:
    from dsjax.kernels.swiglu import SwiGLU

    wide = _shape((experts, WIDTH, EMBED), place, dtype)
    return SwiGLU(wide, wide, _shape((experts, EMBED, WIDTH), place, dtype))


def _shape(sizes: tuple[int, ...], place: Any, dtype: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


if __name__ == "__main__":
    run(main)
