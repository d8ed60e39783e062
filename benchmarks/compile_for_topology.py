"""Compile the train step for a TPU slice that is not there: memory a chip, and the time it takes.

    pip install -e '.[plan]'
    python benchmarks/compile_for_topology.py v3-671b-v5p-512 --topology v5p:8x8x8 --layers 6 31 61

`dsjax plan` says more of one program; this compares depths. A program of 671B takes minutes on two
cores.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from dsjax.cli import run
from dsjax.cli_plan import describe_host


def main() -> None:
    """One line of JSON for each number of layers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a YAML file, or a name under configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--topology", required=True, help="such as v5p:8x8x8")
    parser.add_argument("--layers", nargs="*", type=int, help="in place of the model's own number")
    arguments = parser.parse_args()
    describe_host(arguments.topology)

    from dsjax.config_files import load_pretrain_config

    for layers in arguments.layers or [None]:
        change = [] if layers is None else [f"model.num_hidden_layers={layers}"]
        config = load_pretrain_config(arguments.config, [*arguments.overrides, *change])
        print(json.dumps(compile_step(config, arguments.topology)), flush=True)


def compile_step(config: Any, topology: str) -> dict[str, Any]:
    """Lower and compile the step of `config`; bytes are those of one device."""
    from dsjax.planning.compile import compile_now, described_devices, versions
    from dsjax.planning.train import train_job

    begin = time.monotonic()
    job = train_job(config, described_devices(topology))
    traced = time.monotonic()
    compiled = compile_now(job.lowered)
    sizes = job.layout.mesh.shape
    tokens = config.training.microbatch_size * config.data.sequence_length
    return {
        "topology": topology,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "layers": config.model.num_hidden_layers,
        "tokens_per_device": tokens // job.layout.mesh.size,
        "state_gb": sum(job.lasting.values()) / 1e9,
        "peak_gb": compiled.hbm / 1e9,
        "fits": not compiled.refusal,
        "trace_seconds": traced - begin,
        "compile_seconds": compiled.seconds,
        "versions": versions(),
    }


if __name__ == "__main__":
    run(main)
