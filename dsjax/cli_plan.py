"""`dsjax plan` on the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

DESCRIPTION = """\
What a run needs on TPUs that are not there: its train step is compiled by the compiler that would
be used there, which needs no TPU, for a slice that is only described; then memory, time by kind of
work, tokens a second and chip-hours are read from the compiled program.

CHIP is v5e, v5p or tpu7x; XxYxZ the chips along each axis of its torus (two for v5e). Small models
take a minute, 671B some ten on two cores; what was compiled is kept, and read the next time.
docs/pods.md says what is counted, and how far to trust it. Needs the extra `plan`."""

EXAMPLES = """\
examples:
  dsjax plan v3-671b-v5p-512 --topology v5p:8x8x8
  dsjax plan v2-lite-16b-v5e-16 --topology v5e:4x4 training.microbatch_size=4 --json
  dsjax plan my-run.yaml --topology tpu7x:4x4x4 --picture plan.png
"""


def add_plan(verbs: argparse._SubParsersAction[Any]) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "plan",
        help="memory, time and cost of a run on TPUs that are not there",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("config", metavar="CONFIG",
                      help="a YAML file, or a name under configs/")  # fmt: skip
    verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                      help="settings that replace those of the file")  # fmt: skip
    verb.add_argument("--topology", required=True, metavar="CHIP:XxYxZ",
                      help="the slice, such as v5p:8x8x8")  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--picture", type=Path, metavar="FILE",
                      help="draw the time by kind of work, as PNG")  # fmt: skip
    verb.add_argument("--price", type=float, metavar="DOLLARS",
                      help="of a chip and hour, to say what the run costs")  # fmt: skip
    verb.add_argument("--cache", type=Path, metavar="FOLDER",
                      help="where compiled programs are kept (~/.cache/dsjax/plans)")  # fmt: skip
    verb.set_defaults(verb=_plan)


def _plan(
    config: str,
    overrides: list[str],
    topology: str,
    json: bool,
    picture: Path | None,
    price: float | None,
    cache: Path | None,
) -> None:
    import json as json_module

    from dsjax.config_files import load_pretrain_config

    run = load_pretrain_config(config, overrides)
    describe_host(topology)
    from rich.console import Console

    from dsjax.planning.picture import draw_plan
    from dsjax.planning.plan import make_plan
    from dsjax.planning.report import plan_json, print_plan

    made = make_plan(run, topology, cache or Path.home() / ".cache/dsjax/plans")
    if picture:
        draw_plan(made, picture, title=f"{config} on {topology}")
    if json:
        print(json_module.dumps(plan_json(made, price)))
    else:
        print_plan(Console(), made, price)


def describe_host(topology: str) -> None:
    """Tell the compiler of the machine that it would run on, before jax is imported.

    It asks for it, though nothing is going to run; on a machine without TPUs it would search.
    """
    chip = topology.partition(":")[0]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip}-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
