"""Tokens per second of reading prompts and of decoding on a CPU: dsjax beside transformers.

    python benchmarks/inference.py             needs the `parity` extra; some twenty minutes

Both run the same 81M-parameter DeepSeek-V3 (random weights, float32, two threads), each in a
process of its own, in turns; transformers with the best of its attention and expert backends for
each job. The jobs: a prompt of 512 tokens; 96 tokens after a prompt of 32, one sequence and eight;
and 64 requests of mixed lengths, whose output counts: transformers' generate takes them in batches
of 16, sorted so that little is padded. With `--run DIRECTORY`, a trained
model with MTP is decoded with and without drafts as well. Prints one table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
from contest import (
    ATTENTION,
    EXPERTS,
    Contestants,
    Worker,
    measure,
    model_config,
    transformers_model,
)

PROMPT, NEW = 32, 96
BATCH = 16
"""Of transformers' static batches; 8 and 32 are no faster."""

Job = list[tuple[list[int], int]]
"""Prompts, and how many tokens are to follow each."""


def jobs() -> dict[str, Job]:
    """What is measured."""
    rng = np.random.default_rng(0)

    def prompt(length: int) -> list[int]:
        return rng.integers(2, model_config().vocab_size, length).tolist()

    mixed = [(prompt(int(rng.integers(16, 256))), int(rng.integers(16, 96))) for _ in range(64)]
    return {
        "prefill 512": [(prompt(512), 1)],
        "decode, batch 1": [(prompt(PROMPT), NEW)],
        "decode, batch 8": [(prompt(PROMPT), NEW) for _ in range(8)],
        "64 mixed requests": mixed,
    }


def counted(name: str, job: Job) -> int:
    """Tokens that count: those read in prefill, those made elsewhere."""
    return sum(len(p) for p, _ in job) if name == "prefill 512" else sum(n for _, n in job)


def dsjax_contestants() -> Contestants:
    """Every job through the engine."""
    import jax

    from dsjax.model.transformer import Transformer

    config = model_config()
    model = jax.jit(lambda key: Transformer(config, key))(jax.random.key(0))
    return {f"{name} | dsjax": engine_run(model, job) for name, job in jobs().items()}


def engine_run(model: object, job: Job, drafts: int = 0) -> Callable[[], object]:
    """An engine of the job's size; every call runs requests that are new to its cache."""
    from dsjax.inference.engine import Engine
    from dsjax.inference.request import Request, SamplingParams
    from dsjax.inference.settings import EngineSettings

    settings = EngineSettings(rows=min(len(job), 32), context=1024, drafts=drafts)
    engine = Engine(model, settings)  # pyright: ignore[reportArgumentType]
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        for number, (prompt, new) in enumerate(job):
            sampling = SamplingParams(max_tokens=new, ignore_eos=True)
            fresh = (calls + 1, *prompt[1:])  # no page of an earlier call fits
            engine.submit(Request(str(number), fresh, sampling))
        while not engine.idle:
            engine.step()

    return run


def transformers_contestants() -> Contestants:
    """Every job with every pair of transformers' backends."""
    found: Contestants = {}
    for attention in ATTENTION:
        for experts in EXPERTS:
            model = transformers_model(attention, experts).eval()
            for name, job in jobs().items():
                label = f"{name} | transformers {attention}, {experts}"
                found[label] = partial(transformers_run, model, job)
    return found


def transformers_run(model: object, job: Job) -> None:
    """Static batches of sequences that are alike in length, padded on the left."""
    import torch

    ordered = sorted(job, key=lambda one: (one[1], len(one[0])))
    for begin in range(0, len(ordered), BATCH):
        batch = ordered[begin : begin + BATCH]
        longest = max(len(prompt) for prompt, _ in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                ids,
                attention_mask=mask if len(batch) > 1 else None,
                max_new_tokens=max(new for _, new in batch),
                min_new_tokens=max(new for _, new in batch),
                do_sample=False,
                pad_token_id=0,
            )


def draft_contestants(folder: str) -> Contestants:
    """A trained model's own text, decoded with 0, 1 and 2 drafts a step."""
    import dsjax

    model = dsjax.load(folder)
    tokenizer = dsjax.load_tokenizer(f"{folder}/tokenizer")
    text = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self."
    prompt = [token for token in (tokenizer.bos_id, *tokenizer.encode(text)) if token is not None]
    job = [(prompt, 200)]
    return {f"MTP, {drafts} drafts | dsjax": _always(model, job, drafts) for drafts in (0, 1, 2)}


def _always(model: object, job: Job, drafts: int) -> Callable[[], object]:
    """Drafts at every step: what the engine would decide by itself is what is measured here."""
    from unittest import mock

    run = engine_run(model, job, drafts)

    def forced() -> None:
        target = "dsjax.inference.speculation.Speculation.choose"
        with mock.patch(target, lambda self, rows: self.drafts):
            run()

    return forced


def main() -> None:
    """Time both, alternating, and print."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Tokens per second of prefill and decoding.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", help="the directory of a trained run with MTP")
    args = parser.parse_args()

    makers: list[Callable[[], Contestants]] = [dsjax_contestants, transformers_contestants]
    if args.run:
        makers.append(partial(draft_contestants, args.run))
    team = partial(re.sub, "transformers .*", "transformers")
    times = measure([Worker(make) for make in makers], args.rounds, team)
    sizes = {name: counted(name, job) for name, job in jobs().items()}
    speed = {
        name: sizes.get(name.split(" | ")[0], 200) / statistics.median(t.wall for t in ts)
        for name, ts in times.items()
    }
    table = Table(title="81M, float32, two threads")
    for heading in ("", "dsjax tokens/s", "transformers, best", "with", "ratio"):
        table.add_column(heading)
    ratios = {}
    for name in sizes:
        (theirs,) = (n for n in speed if n.startswith(f"{name} | transformers"))
        ours, how = speed[f"{name} | dsjax"], theirs.split("transformers ")[1]
        ratios[name] = ours / speed[theirs]
        table.add_row(name, f"{ours:,.0f}", f"{speed[theirs]:,.0f}", how, f"{ratios[name]:.2f}")
    for name in [n for n in speed if n.startswith("MTP")]:
        ratios[name] = speed[name] / speed["MTP, 0 drafts | dsjax"]
        table.add_row(name.split(" | ")[0], f"{speed[name]:,.0f}", "", "", f"{ratios[name]:.2f}")
    Console().print(table)
    print(json.dumps({"ratio": ratios, "tokens_s": speed}))


if __name__ == "__main__":
    main()
