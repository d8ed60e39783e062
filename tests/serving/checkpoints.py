"""A released folder of the smallest model, with a tokenizer and a chat template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dsjax.checkpoint.families import ROUTER_BIAS, tensors
from dsjax.config_files import load_model_config
from dsjax.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"
TEMPLATE = """\
{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"""
TEXT = "def f(self, x):\n    return self.x + x  # the user asks, the assistant answers: 0 1 2 3\n"

# Programs of their own use one device, as a laptop would.
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}


def write_checkpoint(folder: Path, template: str | None = TEMPLATE, mtp: int = 0) -> Path:
    """Random weights, far enough apart that no two tokens are equally likely."""
    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 256}
    sizes["num_nextn_predict_layers"] = mtp
    config = load_model_config("cpu-tiny").model_copy(update=sizes)
    folder.mkdir()
    written = config.model_dump()
    written["rope_scaling"]["type"] = "yarn"
    (folder / "config.json").write_text(json.dumps(written))
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    for tensor in tensors(config):
        if tensor.repeats:
            weights[tensor.name] = weights[tensor.repeats]
            continue
        scale = 0.0 if tensor.kind == ROUTER_BIAS else tensor.shape[-1] ** -0.5
        weights[tensor.name] = (scale * rng.normal(size=tensor.shape)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "np"})
    train_tokenizer([TEXT * 20], 320).save(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def command(*arguments: object) -> list[str]:
    """`python serve.py ...`."""
    return [sys.executable, str(ROOT / "serve.py"), *map(str, arguments)]


def serve(*arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with `text` on its standard input."""
    return subprocess.run(
        command(*arguments),
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
