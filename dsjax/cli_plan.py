"""`dsjax plan` on the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsjax.errors import UserError
from dsjax.serving.options import mesh_sizes
from sharding.flags import set_flags

DESCRIPTION = """\
What a model needs on TPUs that are not there: its step is compiled by the compiler that would be
used there, which needs no TPU, for a slice that is only described; then memory, time by kind of
work, tokens a second and chip-hours are read from the compiled program.

CHIP is v5e, v5p or tpu7x; XxYxZ the chips along each axis of its torus (two for v5e). Small models
take a minute, 671B many on two cores; what was compiled is kept, and read the next time.
docs/pods.md says what is counted, and how far to trust it. Needs the extra `plan`.

CONFIG is a run of pre-training, or a step of the engine that serve.py and eval run (`task: serve`,
such as those under configs/serving/); with --step prefill or decode it is a model."""

EXAMPLES = """\
examples:
  dsjax plan v3-671b-v5p-512 --topology v5p:8x8x8
  dsjax plan v2-lite-16b-v5e-32 --topology v5e:4x8 training.microbatch_size=32 --json
  dsjax plan my-run.yaml --topology tpu7x:4x4x4 --picture plan.png
  dsjax plan serving/r1-v5e-64 --topology v5e:8x8 drafts=1
  dsjax plan v2-lite-16b --topology v5e:2x4 --step decode --rows 64 --context 2048
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
    engine = verb.add_argument_group("steps of the engine, --step prefill or decode")
    engine.add_argument("--step", choices=("train", "prefill", "decode"), default="train",
                        help="what is compiled (train)")  # fmt: skip
    engine.add_argument("--rows", type=int, metavar="N",
                        help="sequences that run at the same time (128)")  # fmt: skip
    engine.add_argument("--context", type=int, metavar="N",
                        help="tokens of each, in the cache (4096)")  # fmt: skip
    engine.add_argument("--drafts", type=int, metavar="N",
                        help="tokens that MTP drafts a step (0)")  # fmt: skip
    engine.add_argument("--dtype", choices=("bfloat16", "fp8"),
                        help="what weights are held in; fp8 is as DeepSeek releases (bfloat16)",
                        )  # fmt: skip
    engine.add_argument("--mesh", type=mesh_sizes, metavar="AXIS=N,...",
                        help="such as expert=16,tensor=4 (all devices on expert)")  # fmt: skip
    verb.set_defaults(verb=_plan)


def _plan(
    config: str,
    overrides: list[str],
    topology: str,
    json: bool,
    picture: Path | None,
    price: float | None,
    cache: Path | None,
    step: str,
    **engine: Any,
) -> None:
    import json as json_module

    job_on = _read_job(config, overrides, topology, step, engine)
    from rich.console import Console

    from dsjax.planning.picture import draw_plan
    from dsjax.planning.plan import make_plan
    from dsjax.planning.report import plan_json, print_plan

    made = make_plan(job_on, topology, cache or Path.home() / ".cache/dsjax/plans")
    if picture:
        draw_plan(made, picture, title=f"{config} on {topology}: {made.details['step']}")
    if json:
        print(json_module.dumps(plan_json(made, price)))
    else:
        print_plan(Console(), made, price)


def _read_job(
    config: str, overrides: list[str], topology: str, step: str, engine: dict[str, Any]
) -> Callable[[Sequence[Any]], Any]:
    """What is to be compiled, on devices that are still to come; jax is imported after CONFIG."""
    from dsjax.config_files import (
        load_model_config,
        load_pretrain_config,
        load_serving_config,
        parse,
    )
    from dsjax.config_serving import ServingConfig

    given = {name: value for name, value in engine.items() if value is not None}
    if step == "train" and given:
        name, value = next(iter(given.items()))
        raise UserError(
            f"--{name} {value} is for a model and --step prefill or decode; CONFIG has settings of "
            f"its own: {name}=..."
        )
    if step == "train":
        serving = load_serving_config(config, overrides)
    elif overrides:
        raise UserError(f"{overrides[0]}: --step {step} takes a model, which has no settings here")
    else:
        tree = {"task": "serve", "model": config, "step": step, **given}
        serving = parse(ServingConfig, tree, source=f"--step {step}")
    if serving is None:
        run = load_pretrain_config(config, overrides)
        describe_host(topology)
        from dsjax.planning.train import train_job

        return partial(train_job, run)
    model = load_model_config(serving.model)
    describe_host(topology)
    from dsjax.planning.serve import serving_job

    return partial(serving_job, model, serving)


def describe_host(topology: str) -> None:
    """Tell the compiler of the machine that it would run on, before jax is imported.

    It asks for it, though nothing is going to run; on a machine without TPUs it would search.
    """
    chip = topology.partition(":")[0]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip}-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    set_flags(chip)
