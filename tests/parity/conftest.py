"""Models of the transformers library and ours, from the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dsjax.checkpoint.from_files import load_files
from dsjax.model.transformer import Transformer

from .models import CASES, SEEDS, make_model

# Models this small lose more to waiting threads than they gain.
torch.set_num_threads(1)


class Pair(NamedTuple):
    """The same model in both libraries."""

    theirs: Any
    ours: Transformer
    folder: Path


@pytest.fixture(scope="package", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, config = CASES[request.param]
    theirs = make_model(kind, config(), SEEDS.get(request.param, 0))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    if request.param == "kimi_k2":  # which transformers knows as deepseek_v3
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "kimi_k2"}))
    return Pair(theirs, load_files(folder), folder)
