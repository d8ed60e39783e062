"""A small tokenizer in the form of Kimi's: pieces that were trained, in a tiktoken file."""

from __future__ import annotations

import base64
import json
import random
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from dsjax.data.byte_level import BYTE_OF
from dsjax.data.tiktoken import PATTERN

CHINESE = (
    "月之暗面科技有限公司发布了新的模型。人之初，性本善；性相近，习相远。床前明月光，疑是地上霜。"
    "举头望明月，低头思故乡。今天天气很好，我们去公园散步吧！二〇二五年七月，北京。東京へ行きます。"
)
OTHER = (
    "Don't you think we'll see IT'S done? I'M, they've, HE'D. naïve café Über Straße. Привет, мир! "
    "مرحبا بالعالم 안녕하세요 こんにちは 🚀🔥👨‍👩‍👧 12345 3.14159 ①②③ x²\r\n\r\n"
    "\t\tindent   \n      end  \n"
)

NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 5: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
"""Some of Kimi-K2's, by their place after the pieces."""
NOT_SPECIAL = {10: "<|im_user|>", 11: "<|im_assistant|>"}

CONFIG = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}


@cache
def pieces() -> list[bytes]:
    """Some 4,000, by their ranks: of code, Chinese and others."""
    code = [p.read_text("utf-8") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(CHINESE, k=rng.randrange(1, 6))) for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*code, *[CHINESE, OTHER] * 50, *mixed], trainer)
    vocabulary = tokenizer.get_vocab()
    return [
        bytes(BYTE_OF[c] for c in text) for text in sorted(vocabulary, key=vocabulary.__getitem__)
    ]


def lines(pieces: list[bytes]) -> list[bytes]:
    """Those of a tiktoken file."""
    return [base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)]


def added_tokens(first: int) -> dict[str, dict[str, Any]]:
    """As tokenizer_config.json has them."""
    special = {str(first + n): {"content": name, "special": True} for n, name in NAMES.items()}
    other = {str(first + n): {"content": n_, "special": False} for n, n_ in NOT_SPECIAL.items()}
    return special | other


def write_kimi(folder: Path, pieces: list[bytes], **config: Any) -> Path:
    """Both files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines(pieces)) + b"\n")
    tree = CONFIG | {"added_tokens_decoder": added_tokens(len(pieces))} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(tree))
    return folder
