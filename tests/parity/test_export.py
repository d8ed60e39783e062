"""What we write, transformers opens, and computes what it computed before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dsjax.checkpoint.convert import convert

from .models import CASES, SEEDS, make_model

FAMILIES = [next(iter(CASES)), "v2", "moonlight", "kimi_k2", "llama3", "qwen2", "qwen3"]


@pytest.mark.parametrize("config", ["theirs", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_what_is_exported(tmp_path: Path, family: str, config: str) -> None:
    kind, make = CASES[family]
    theirs = make_model(kind, make(), SEEDS.get(family, 0))
    theirs.save_pretrained(tmp_path / "hf")
    if family == "kimi_k2":  # which transformers knows as deepseek_v3
        _call(tmp_path / "hf", "kimi_k2")
    convert(tmp_path / "hf", tmp_path / "ours")
    if config == "ours":  # as for a run, which has none of theirs
        shutil.rmtree(tmp_path / "ours/huggingface")
    convert(tmp_path / "ours", tmp_path / "back")
    if family == "kimi_k2":
        _call(tmp_path / "back", "deepseek_v3")
    opened, info = _open(kind, tmp_path / "back", theirs)
    assert not any(info.values()), info
    tokens = torch.arange(48)[None] * 7 % 160
    with torch.no_grad():
        expected, found = theirs(tokens).logits, opened(tokens).logits
    assert torch.equal(found, expected)


def _call(folder: Path, model_type: str) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))


def _open(kind: Any, folder: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    opened, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    opened.set_attn_implementation("eager")
    if hasattr(like.config, "_experts_implementation"):
        opened.config._experts_implementation = "eager"
    return opened.eval(), info
