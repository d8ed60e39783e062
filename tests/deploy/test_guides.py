"""What the guides name is there, and their figures are those of their formulas."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dsjax.config_files import load_pretrain_config

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("cloud-tpu", "gpu", "pods")]

STARTS = {"train.py", "deploy/tpu-vm.sh run", "deploy/slurm.sh", "deploy/xpk.sh v3"}
"""What stands before the configuration of a run."""


def commands(text: str) -> list[list[str]]:
    """The words of every line of every console block."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.S | re.M)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_files_and_runs_that_a_guide_names_are_there(guide: Path) -> None:
    text = guide.read_text()
    named = set(re.findall(r"\b(?:deploy|configs)/[\w./-]+\.\w+", text))
    assert [name for name in named if not (ROOT / name).exists()] == []
    runs = [run for words in commands(text) if (run := run_of(words))]
    assert runs or guide.stem == "pods"
    for name, *settings in runs:
        load_pretrain_config(name, settings)


def run_of(words: list[str]) -> list[str]:
    """The configuration that a command names, and the settings after it."""
    for number, (one, two) in enumerate(pairwise(words)):
        for start in STARTS & {one, f"{one} {two}"}:
            later = words[number + len(start.split()) :]
            return later
    return []


def expert_bytes(name: str) -> tuple[Any, float]:
    """A model, and the bytes of one layer's routed experts in bfloat16."""
    model: Any = load_pretrain_config(name).model
    size = 3 * model.n_routed_experts * model.hidden_size * model.moe_intermediate_size
    return model, 2.0 * size


@pytest.mark.parametrize(
    ("name", "tokens", "limits"),
    [
        ("v3-671b-v5p-512", (4096, 12288, 49152), {8: 4, 64: 8}),
        ("v2-lite-16b-v5e-32", (4096, 16384, 49152), {8: 6, 64: 6}),
    ],
)
def test_the_bytes_that_travel_are_those_of_the_formulas(
    name: str, tokens: tuple[int, ...], limits: dict[int, int]
) -> None:
    text = (ROOT / "docs/pods.md").read_text()
    model, weights = expert_bytes(name)
    for count in tokens:
        sums = [4 * weights] + [
            4 * weights / n + 5 * c * 2 * model.hidden_size * count for n, c in limits.items()
        ]
        row = f"{count:,} | " + " | ".join(f"{value / 1e9:.1f} GB" for value in sums) + " |"
        assert row in text, row


# MTP's layer included: dsjax inspect has them.
PARAMETERS = {"v3": 682_636_487_424, "v2": 15_706_484_224}


@pytest.mark.parametrize(
    ("name", "family", "mesh"),
    [
        ("v3-671b-v5p-512", "v3", None),
        ("v3-671b-v5p-512", "v3", {"fsdp": 512}),
        ("v2-lite-16b-v5e-32", "v2", None),
        ("v2-lite-16b-h100-8", "v2", None),
    ],
)
def test_the_memory_of_each_run_is_that_of_the_formulas(
    name: str, family: str, mesh: dict[str, int] | None
) -> None:
    config = load_pretrain_config(name)
    sizes = mesh or config.mesh.model_dump()
    fsdp, expert, tensor = (int(sizes.get(axis, 1)) for axis in ("fsdp", "expert", "tensor"))
    model, layer = expert_bytes(name)
    state = 12 * PARAMETERS[family] / (fsdp * expert * tensor)
    rows = config.training.microbatch_size / (fsdp * expert)
    kept = model.num_hidden_layers + model.num_nextn_predict_layers
    inputs = 2 * rows * config.data.sequence_length * model.hidden_size * kept
    rest = 2 * rest_of_a_layer(model)
    gathered = 2 * (layer / expert + rest) / tensor
    row = " | ".join(f"{value / 1e9:.1f} GB" for value in (state, inputs, gathered))
    assert row in (ROOT / "docs/pods.md").read_text(), row


def rest_of_a_layer(model: Any) -> int:
    """Parameters of attention and shared experts."""
    heads, d = model.num_attention_heads, model.hidden_size
    query = model.qk_nope_head_dim + model.qk_rope_head_dim
    into = model.q_lora_rank or d
    attention = into * heads * query + (d * into if model.q_lora_rank else 0)
    attention += d * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention += heads * model.v_head_dim * d
    return attention + 3 * d * model.moe_intermediate_size * model.n_shared_experts
