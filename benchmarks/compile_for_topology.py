"""Compile the train step for a TPU slice that is not there: memory a chip, and the time it takes.

    pip install -e '.[tpu]'
    python benchmarks/compile_for_topology.py v3-671b-v5p-512 --topology v5p:8x8x8 --layers 6 31 61

The compiler that comes with `jax[tpu]` needs no TPU. A program of 671B takes minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from importlib.metadata import version
from typing import Any

# The compiler asks for the machine it would run on; and nothing here is to run.
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    """One line of JSON, and one of text, for each number of layers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a YAML file, or a name under configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--topology", required=True, help="such as v5p:8x8x8")
    parser.add_argument("--layers", nargs="*", type=int, help="in place of the model's own number")
    arguments = parser.parse_args()
    kind = arguments.topology.split(":")[0]
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-8")

    from dsjax.config_files import load_pretrain_config

    for layers in arguments.layers or [None]:
        change = [] if layers is None else [f"model.num_hidden_layers={layers}"]
        config = load_pretrain_config(arguments.config, [*arguments.overrides, *change])
        record = compile_step(config, arguments.topology)
        print(json.dumps(record), flush=True)


def compile_step(config: Any, topology: str) -> dict[str, Any]:
    """Lower and compile the step of `config`; bytes are those of one chip."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from dsjax.checkpoint.store import abstract_on
    from dsjax.model.layers import tree_shardings
    from dsjax.training.run import make_layout
    from dsjax.training.step import Batch, Knobs, init_state, make_train_step
    from sharding.rules import use_layout

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    layout = make_layout(config, described.devices)
    abstract = jax.eval_shape(partial(init_state, config))
    shardings = tree_shardings(abstract, layout)
    training = config.training
    slots = int(max(stage.value for stage in training.batch_size)) // training.microbatch_size
    shape = (slots, training.microbatch_size, config.data.sequence_length)
    spread, everywhere = layout.sharding((None, "batch", None), shape), layout.sharding((), ())
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread)
    number: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    arguments = abstract_on(abstract, shardings), Batch(rows, rows), count, Knobs(*[number] * 3)
    with use_layout(layout):
        begin = time.monotonic()
        lowered = jax.jit(make_train_step(config), donate_argnums=0).lower(*arguments)
        traced = time.monotonic()
        compiled = lowered.compile()
        done = time.monotonic()
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "topology": topology,
        "mesh": {axis: size for axis, size in layout.mesh.shape.items() if size > 1},
        "layers": config.model.num_hidden_layers,
        "tokens_per_chip": training.microbatch_size * shape[2] // layout.mesh.size,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "peak_gb": held / 1e9,
        "trace_seconds": traced - begin,
        "compile_seconds": done - traced,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
    }


if __name__ == "__main__":
    main()
