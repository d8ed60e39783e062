"""What a freshly trained model writes when it is shown the beginning of a program."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel

from dsjax.checkpoint.load import load
from dsjax.config import PretrainConfig
from dsjax.data.tokenizer import load_tokenizer
from dsjax.inference.generate import generate
from sharding.distributed import is_alone

PROMPT = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self."


def show_sample(config: PretrainConfig, console: Console) -> None:
    """Load the run's newest weights, continue `PROMPT`, and print what comes out.

    Nothing where no tokens are asked for, and among several processes: decoding is for one.
    """
    if config.evaluation.sample_tokens == 0 or not is_alone():
        return
    model = load(config.run_dir)
    tokenizer = load_tokenizer(f"{config.run_dir}/tokenizer")
    prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    [made] = generate(
        model,
        [[token for token in prompt if token is not None]],
        max_new_tokens=config.evaluation.sample_tokens,
        temperature=0.6,
        seed=config.seed,
        vocab_size=tokenizer.vocab_size,
    )
    text = PROMPT + tokenizer.decode(made)
    console.print(Panel(text.rstrip(), title="a sample, temperature 0.6", title_align="left"),
                  highlight=False, markup=False)  # fmt: skip
