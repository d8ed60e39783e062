"""Kimi's tokenizer against the library that its file is made for."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken

from dsjax.data.byte_level import BYTE_OF
from dsjax.data.tiktoken import FILE, PATTERN, SPECIAL_TOKENS
from dsjax.data.tokenizer import load_tokenizer, train_tokenizer
from dsjax.errors import UserError

NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 9: "<think>"}

TEXTS = [
    "Hello, world! It's what they'd SAY: don't, WON'T; naïve café, Ελληνικά, עברית, русский язык.",
    "def f(self, x):\n    return self.x[0] + 123456.7  # tab:\t\n\n\n  if x:\r\n\t\treturn None\n",
    "你好世界！这是一段用于测试的中文文本。混合 English 与 日本語のテキスト、한국어 텍스트 12345",
    "🎉👩‍👩‍👧‍👦 ½ ①② ... !!!???   \u00a0\u3000  <|im_end|> [BOS] <think> x\u0301y\u0308",
    "camelCaseWords HTTPServer getURLForID iPhone aBc ABCdef",
    "a" * 300 + " " * 300 + "\n" * 50 + "ab" * 100,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A vocabulary of some 2,000 tokens, learned from the texts, in Kimi's two files."""
    folder = tmp_path_factory.mktemp("kimi")
    trained = train_tokenizer(TEXTS * 3 + [Path(__file__).read_text()] * 3, 2200)
    special = set(trained.added_tokens.values())
    ids = [number for number in range(trained.vocab_size) if number not in special]
    tokens = [trained.token_bytes(number) for number in ids]
    write(folder, [b for b in tokens if len(b) == 1] + [b for b in tokens if len(b) > 1])
    return folder


def write(folder: Path, tokens: list[bytes]) -> None:
    lines = [base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)]
    (folder / FILE).write_bytes(b"".join(lines))
    added = {
        str(len(tokens) + place): {"content": name, "special": name != "<think>"}
        for place, name in NAMED.items()
    }
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def reference(folder: Path) -> tiktoken.Encoding:
    lines = [line.split() for line in (folder / FILE).read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(
        "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<unused>": len(ranks)}
    )


def drawn_texts(count: int) -> list[str]:
    """Characters of all kinds, and pieces of the texts, in any order."""
    rng = random.Random(0)
    scripts = [(0x20, 0x7F), (0, 0x250), (0x370, 0x600), (0x4E00, 0x9FFF), (0x3000, 0x3100)]
    scripts += [(0x1F300, 0x1F700), (0x2000, 0x2100), (0xAC00, 0xD7A0), (0x10000, 0x11000)]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            begin, end = rng.choice(scripts)
            parts.append("".join(chr(rng.randrange(begin, end)) for _ in range(rng.randrange(8))))
            text = rng.choice(TEXTS)
            start = rng.randrange(len(text))
            parts.append(text[start : start + rng.randrange(20)])
            parts.append(rng.choice([" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", ""]))
        texts.append("".join(parts))
    return texts


def test_texts_have_the_ids_that_tiktoken_gives_them(folder, reference):
    tokenizer = load_tokenizer(folder)
    for text in [*TEXTS, *drawn_texts(3000)]:
        expected = reference.encode(text, disallowed_special=())
        named = tokenizer.encode(text)
        if "<think>" not in text:  # no special token, but one that text may spell
            assert named == expected, text
        assert tokenizer.decode(named) == text


def test_special_tokens_have_their_names_and_the_others_numbers(folder, reference):
    tokenizer = load_tokenizer(folder)
    begin = reference.n_vocab - 1
    assert tokenizer.vocab_size == begin + SPECIAL_TOKENS
    assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, begin + 1)
    added = tokenizer.added_tokens
    assert {added[name] - begin: name for name in NAMED.values()} == NAMED
    assert added[f"<|reserved_token_{begin + 255}|>"] == begin + 255
    assert begin + 9 not in tokenizer.special_ids and begin + 2 in tokenizer.special_ids
    assert tokenizer.byte_level
    assert all(tokenizer.token_bytes(i) == reference.decode_single_token_bytes(i) for i in (0, 999))


def test_it_is_saved_as_a_tokenizer_json(folder, tmp_path):
    tokenizer = load_tokenizer(folder / FILE)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).digest == tokenizer.digest


BYTES = [bytes([byte]) for byte in BYTE_OF.values()]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            lambda good: [*good[:9], b"no base64", *good[10:]],
            "line 10 is 'no base64'",
        ),
        (lambda good: good[:9] + good[10:], "line 10 .* expected a new token"),
        (lambda good: [*good, good[0].split()[0] + b" 256"], "line 257"),
        (lambda good: [*good, b"YWI= 257"], "line 257 is 'YWI= 257'"),
        (lambda good: good[:-1], f"no token for the byte {BYTES[-1][0]}"),
        (lambda good: [], "no token for the byte 0"),
        (lambda good: [b"\xff\x00" * 5000], "line 1 is"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, lines, said):
    write(tmp_path, BYTES)
    good = (tmp_path / FILE).read_bytes().splitlines()
    (tmp_path / FILE).write_bytes(b"\n".join(lines(good)))
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


@pytest.mark.parametrize("key", ["255", "512", "-1", "x", "²", "9" * 5000])
def test_a_special_token_of_another_id_is_refused(tmp_path, key):
    write(tmp_path, BYTES)
    config = {"added_tokens_decoder": {key: {"content": "[EOS]"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="under a number from 256 to 511"):
        load_tokenizer(tmp_path)
