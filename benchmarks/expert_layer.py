"""Compile one layer of V3's experts for TPUs that are not there, forward and backward.

    pip install -e '.[plan]'
    python benchmarks/expert_layer.py --topology v5p:2x2x1 --tokens 12288 --hlo layer.txt

For one device, with 32 of the 256 experts. Prints temporaries, and for each kernel what the
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


def main() -> None:
    """Compile, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topology", default="v5p:2x2x1", help="such as v5p:2x2x1")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--hlo", type=Path, help="where to write the compiled program")
    arguments = parser.parse_args()
    describe_host(arguments.topology)

    began = time.perf_counter()
    program = _lower(arguments.topology, arguments.tokens).compile()
    print(f"compiled in {time.perf_counter() - began:.0f} s")
    print(f"temporaries {program.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB")
    text = program.as_text()
    told = r'%(grouped_\w+)[.\d]* = .*"flops":"(\d+)".*?"bytes_accessed":"(\d+)"'
    for name, flops, moved in re.findall(told, text):
        print(f"{name}: {int(flops) / 1e12:.2f} TFLOP, {int(moved) / 1e9:.1f} GB")
    if arguments.hlo:
        arguments.hlo.write_text(text)


def _lower(topology: str, tokens: int) -> Any:
    import jax
    import jax.numpy as jnp

    from dsjax.kernels import experts
    from dsjax.kernels.permutation import sort_by_expert
    from dsjax.kernels.swiglu import SwiGLU
    from dsjax.planning.compile import described_devices

    place = jax.sharding.SingleDeviceSharding(described_devices(topology)[0])

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def stacks(dtype: Any) -> SwiGLU:
        wide = shape(EXPERTS, WIDTH, EMBED, dtype=dtype)
        return SwiGLU(wide, wide, shape(EXPERTS, EMBED, WIDTH, dtype=dtype))

    def layer(x: Any, weights: Any, chosen: Any, gates: Any, dy: Any, into: Any) -> Any:
        order = sort_by_expert(chosen, EXPERTS)
        y, before = experts.multiply(x, weights, order, gates)
        return y, experts.multiply_gradient(x, weights, order, gates, before, dy, into)

    return jax.jit(layer, donate_argnums=5).lower(
        shape(tokens, EMBED),
        stacks(jnp.bfloat16),
        shape(tokens, CHOICES, dtype=jnp.int32),
        shape(tokens * CHOICES, dtype=jnp.float32),
        shape(tokens, EMBED),
        stacks(jnp.float32),
    )


if __name__ == "__main__":
    run(main)
