"""Released folders in small: each family's structure around a small trained vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from tests.data.kimi import CHINESE, OTHER

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [CHINESE, OTHER, "the quick brown fox jumps over the lazy dog 1234 12 345\n\n    x"] * 20
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@cache
def _trained(digits: str, count: int) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS % digits), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def _write(folder: Path, tree: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _added(
    tokenizer: tokenizers.Tokenizer, tokens: Sequence[tuple[str, bool]]
) -> dict[str, dict[str, Any]]:
    """Add the tokens; returns them as `added_tokens_decoder` has them."""
    decoder = {}
    for content, special in tokens:
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
        number = tokenizer.token_to_id(content)
        decoder[str(number)] = {"content": content, **FLAGS, "special": special}
    return decoder


LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]


def write_llama3(folder: Path) -> Path:
    """Words that are tokens are taken whole; a template adds bos."""
    tokenizer = tokenizers.Tokenizer.from_str(_trained("{1,3}", 900))
    decoder = _added(tokenizer, [(content, True) for content in LLAMA])
    bos = LLAMA[0]
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, tokenizer.token_to_id(bos))]
        ),
    ])  # fmt: skip
    tree = json.loads(tokenizer.to_str())
    # A few words become tokens that no merge leads to.
    tree["model"] |= {"ignore_merges": True}
    for word in ("Ġquick", "fox", "Ġlazy"):
        tree["model"]["merges"] = [
            merge for merge in tree["model"]["merges"] if "".join(merge) != word
        ]
    config = {
        "added_tokens_decoder": decoder, "bos_token": bos, "eos_token": LLAMA[3],
        "clean_up_tokenization_spaces": True, "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    return _write(folder, tree, config)


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_TOOLS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


def write_qwen2(folder: Path) -> Path:
    """NFC, no bos; thinking and tool tags stand in tokenizer_config.json alone."""
    tokenizer = tokenizers.Tokenizer.from_str(_trained("", 900))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    decoder = _added(tokenizer, [(content, True) for content in QWEN])
    tree = json.loads(tokenizer.to_str())
    decoder |= _added(tokenizer, [(content, False) for content in QWEN_TOOLS])
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder,
        "additional_special_tokens": QWEN[1:], "bos_token": None, "eos_token": QWEN[2],
        "pad_token": QWEN[0], "unk_token": None, "split_special_tokens": False,
        "clean_up_tokenization_spaces": False, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    return _write(folder, tree, config)


PHI = ["<|user|>", "<|end|>", "<s>"]


def write_stripping(folder: Path) -> Path:
    """Added tokens that take white space along, or stand alone: as Phi-3's do."""
    tokenizer = tokenizers.Tokenizer.from_str(_trained("", 600))
    decoder = _added(tokenizer, [(content, True) for content in PHI] + [("word", False)])
    flags = {"<|user|>": "rstrip", "<|end|>": "lstrip", "word": "single_word"}
    for token in decoder.values():
        if token["content"] in flags:
            token[flags[token["content"]]] = True
    config = {
        "added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    return _write(folder, json.loads(tokenizer.to_str()), config)
