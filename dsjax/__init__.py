"""DeepSeek-V3 and R1 in JAX and Flax.

    model     = dsjax.load(path)               a Hugging Face folder, or a run of train.py
    tokenizer = dsjax.load_tokenizer(path)
    out       = model(tokens)                  out.hidden, out.logits, out.mtp_logits
    more      = dsjax.generate(model, prompts, max_new_tokens=64)
    dsjax.save(model, path, format="hf")       for other libraries; "dsjax" for orbax

What is named here is imported when it is first used: commands that only read headers must not
wait for jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.checkpoint.load import load as load
    from dsjax.checkpoint.save import save as save
    from dsjax.data.tokenizer import load_tokenizer as load_tokenizer
    from dsjax.inference.generate import generate as generate

_HOMES = {
    "load": "dsjax.checkpoint.load",
    "save": "dsjax.checkpoint.save",
    "load_tokenizer": "dsjax.data.tokenizer",
    "generate": "dsjax.inference.generate",
}

__all__ = ["generate", "load", "load_tokenizer", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
