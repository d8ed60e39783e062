"""`dsjax sample` on the command line."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = """\
Rejection sampling, as DeepSeek-R1's data for supervised tuning was made: several answers to each
prompt are drawn from a checkpoint, scored by verifiable rewards, and filtered. What is kept is
written as chat data with its provenance, which `task: sft` of train.py reads.

CONFIG is a YAML file:

  checkpoint: runs/mine                  a run, dsjax weights, or a Hugging Face folder
  output: data/mine                      the folder that is written
  prompts: {path: questions.jsonl}       each line has `prompt`, and what the rewards need
  rewards: [{name: math}]                the first says what is correct
  sampling: {k: 16, max_tokens: 4096}    also temperature, top_p, top_k, rows
  keep_per_prompt: 4                     of those that pass, at most; left out: all

Filters, unless `filters` lists others, or none ([]): finished, correct, language (one of them),
readable (no code block or long paragraph in the thought, no repetition), distinct. `limit` takes
only so many prompts. docs/r1.md has the rules."""

EXAMPLES = """\
examples:
  dsjax sample my-prompts.yaml
  dsjax sample my-prompts.yaml sampling.k=64 output=data/more
  dsjax sample my-prompts.yaml 'filters=[]' sampling.k=1 output=data/unfiltered
  dsjax sample r1/cpu-comparison-sample            a run of r1/cpu-comparison, on a CPU

Stopped or killed, the same command goes on, and the files become those of a run that was not.
OUTPUT/sft.jsonl: what was kept. OUTPUT/answers.jsonl: every answer, its rewards, its verdict.
OUTPUT/summary.json: how many were refused, and why.
"""


def add_sample(verbs: argparse._SubParsersAction[Any]) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "sample",
        help="many answers to each prompt, the right ones kept as training data",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("config", metavar="CONFIG",
                      help="a YAML file, or a name under configs/")  # fmt: skip
    verb.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                      help="settings that replace those of the file")  # fmt: skip
    verb.set_defaults(verb=_sample)


def _sample(config: str, overrides: list[str]) -> None:
    from rich.console import Console

    from dsjax.config_files import load_sample_config
    from dsjax.posttraining.sample import sample

    sample(load_sample_config(config, overrides), Console())
