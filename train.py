"""Train a model: `python train.py CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter

from dsjax.cli import Parser, read_together, run

DEFAULT = "cpu-demo"
DESCRIPTION = "Train as a configuration says, or go on where its run directory left off."
EXAMPLES = """\
examples:
  python train.py                                  the CPU demo, a few minutes
  python train.py training.tokens=1M run_dir=runs/short
  python train.py cpu-tiny training.tokens=20K     a name under configs/, one setting changed
  python train.py my-run.yaml mesh.expert=4
  python train.py cpu-sft data.paths.0=chats.jsonl learn from conversations
  python train.py r1/cpu-comparison-form           a cold start, then learn from rewards:
  python train.py r1/cpu-comparison                docs/r1.md tells of both

Exit codes: 0 done, 2 your input is wrong (one line says what), 143 stopped by SIGTERM after
saving, 75 another process was lost: start all again, 1 the run diverged or a fault of ours.
"""


def main() -> None:
    """Parse, read the configuration, and do its task."""
    parser = Parser(prog="train.py", description=DESCRIPTION, epilog=EXAMPLES,
                    formatter_class=RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("config", nargs="?", default=DEFAULT, metavar="CONFIG",
                        help=f"a YAML file, or a name under configs/ ({DEFAULT})")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="settings that replace those of the file")  # fmt: skip
    arguments = parser.parse_args()
    name, overrides = arguments.config, arguments.overrides
    if "=" in name:  # no configuration named, only settings changed
        name, overrides = DEFAULT, [name, *overrides]

    # Imported late: `--help` and a wrong configuration need no jax.
    from rich.console import Console

    from dsjax.checkpoint.source import model_of
    from dsjax.config import PretrainConfig
    from dsjax.config_files import load_run_config, refuse_placeholders
    from dsjax.config_grpo import GrpoRunConfig
    from dsjax.config_sft import DistillConfig, SftConfig

    config = read_together(
        lambda: refuse_placeholders(load_run_config(name, overrides, model_of), name)
    )
    console = Console()
    if isinstance(config, GrpoRunConfig):
        from dsjax.posttraining.grpo import grpo

        grpo(config, console)
    elif isinstance(config, SftConfig):
        from dsjax.posttraining.sft import sft

        sft(config, console)
    elif isinstance(config, DistillConfig):
        from dsjax.posttraining.distill import distill

        distill(config, console)
    elif isinstance(config, PretrainConfig):
        from dsjax.inference.samples import show_sample
        from dsjax.training.pretrain import pretrain

        pretrain(config, console)
        show_sample(config, console)


if __name__ == "__main__":
    run(main)
