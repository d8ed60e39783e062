"""Kimi's tiktoken file against the tiktoken library, and what is wrong with a file."""

import base64
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.errors import UserError

from .kimi import CHINESE, NAMES, NOT_SPECIAL, OTHER, lines, pieces
from .kimi import write_kimi as write

# As in the code that Kimi-K2 was released with.
RELEASED_PATTERN = (
    r"[\p{Han}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def reference(folder: Path) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(folder / "tiktoken.model"))
    added = {n + len(ranks): name for n, name in (NAMES | NOT_SPECIAL).items()}
    ids = range(len(ranks), len(ranks) + 256)
    special = {added.get(i, f"<|reserved_token_{i}|>"): i for i in ids}
    return tiktoken.Encoding(
        "kimi", pat_str=RELEASED_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kimi"), pieces())


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def code() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[bc]*.py"))
    return [file.read_text("utf-8") for file in files]


def random_characters() -> list[str]:
    """Of all planes, of the first ones, and of what the pattern speaks of."""
    rng = random.Random(1)
    alphabets: list[Callable[[], int]] = [
        lambda: rng.randrange(0x110000),
        lambda: rng.randrange(0x3100),
        lambda: rng.randrange(0x3400, 0xA000),
        lambda: ord(rng.choice(" \t\r\n\u3000\x85aA'sSſtTrRlL1²٣é\u0301ǅʰー々〇人之_-.!🚀\u200d")),
    ]
    texts = []
    for _ in range(4000):
        alphabet = rng.choice(alphabets)
        numbers = [alphabet() for _ in range(rng.randrange(40))]
        texts.append("".join(chr(n) for n in numbers if not 0xD800 <= n < 0xE000))
    return texts


def random_bytes() -> list[str]:
    rng = random.Random(2)
    return [rng.randbytes(rng.randrange(200)).decode("utf-8", "replace") for _ in range(1000)]


def mixtures() -> list[str]:
    rng = random.Random(3)
    words = [*CHINESE, *OTHER.split(" "), " ", "  ", "\n", "\r\n", "    "]
    return ["".join(rng.choices(words, k=rng.randrange(60))) for _ in range(2000)]


@pytest.mark.parametrize("texts", [code, random_characters, random_bytes, mixtures])
def test_text_becomes_the_ids_that_tiktoken_gives(
    folder: Path, ours: Tokenizer, texts: Callable[[], list[str]]
) -> None:
    theirs = reference(folder)
    for text in texts():
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), repr(text)
        assert ours.decode(ids) == text
        assert b"".join(map(ours.token_bytes, ids)) == text.encode()


def test_ranks_that_no_training_would_give_are_joined_as_tiktoken_does(tmp_path: Path) -> None:
    """Pieces of two letters in any order, many of which are made of pieces in several ways."""
    rng = random.Random(4)
    for number in range(30):
        longer = {"".join(rng.choices("ab", k=rng.randrange(2, 7))).encode() for _ in range(25)}
        ranks = [bytes([byte]) for byte in range(256)] + sorted(longer)
        rng.shuffle(ranks)
        folder = write(tmp_path / str(number), ranks)
        mine, theirs = load_tokenizer(folder), reference(folder)
        for _ in range(200):
            text = "".join(rng.choices("ab", k=rng.randrange(1, 30)))
            assert mine.encode(text) == theirs.encode_ordinary(text), (text, ranks)


def test_any_ids_are_decoded_as_tiktoken_does(folder: Path, ours: Tokenizer) -> None:
    theirs, rng = reference(folder), random.Random(5)
    for _ in range(500):
        ids = rng.choices(range(ours.vocab_size), k=20)
        assert b"".join(map(ours.token_bytes, ids)) == theirs.decode_bytes(ids)


def test_the_256_ids_after_the_pieces_have_their_names(ours: Tokenizer) -> None:
    first = len(pieces())
    assert ours.vocab_size == first + 256
    assert (ours.bos_id, ours.eos_id) == (first, first + 1)
    named = {name: first + n for n, name in (NAMES | NOT_SPECIAL).items()}
    assert named.items() <= ours.added_tokens.items()
    assert ours.added_tokens[f"<|reserved_token_{first + 200}|>"] == first + 200
    assert f"<|reserved_token_{first}|>" not in ours.added_tokens
    assert len(ours.added_tokens) == 256
    others = set(range(first, first + 256)) - {first + n for n in NOT_SPECIAL}
    assert ours.special_ids == others


def test_a_special_token_that_is_spelled_means_its_characters(
    folder: Path, ours: Tokenizer
) -> None:
    text = "[BOS]<|im_end|>"
    assert ours.encode(text) == reference(folder).encode_ordinary(text)


def test_saved_as_tokenizer_json_it_is_the_same(ours: Tokenizer, tmp_path: Path) -> None:
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.digest == ours.digest
    for text in (CHINESE, OTHER, *mixtures()[:100]):
        assert again.encode(text) == ours.encode(text)


def test_order_and_blank_lines_do_not_matter(ours: Tokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path, pieces())
    shuffled = lines(pieces())
    random.Random(6).shuffle(shuffled)
    (folder / "tiktoken.model").write_bytes(b"\r\n\r\n".join(shuffled))
    assert load_tokenizer(folder / "tiktoken.model").digest == ours.digest


# ---------------------------------------------------------------------------------------------
# What is wrong with a file
# ---------------------------------------------------------------------------------------------

BYTES = [bytes([byte]) for byte in range(256)]


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def spoil(place: int, line: bytes) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [*lines[: place - 1], line, *lines[place:]]


AB = base64.b64encode(b"ab")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (spoil(7, b"QUI"), "line 7: 'QUI'; expected a piece in base64, a space and a rank"),
        (spoil(7, b"QUI= six"), "line 7: 'QUI= six'; expected a piece"),
        (spoil(7, b"QUI= -6"), "line 7: 'QUI= -6'; expected a piece"),
        (spoil(7, b"QUI=  6"), "line 7: 'QUI= 6'; expected a piece"),  # errors join blanks
        (spoil(7, b"\xff\xfe 6"), "line 7: not the base64 expected here"),
        (spoil(7, b"QUI 6"), "line 7: not the base64 expected here: Incorrect padding"),
        (spoil(7, b"Q*I= 6"), "line 7: not the base64 expected here"),
        (spoil(7, b" 6"), "line 7: a piece without bytes"),
        (spoil(7, b"A" * 100_000 + b" 6"), "line 7: 100,002 bytes long; expected at most 2,048"),
        (spoil(7, AB + b" " + b"6" * 9000), "line 7: 9,005 bytes long"),
        (spoil(7, AB + b" 5"), "line 7: rank 5, as on line 6; expected every rank from 0 to 256"),
        (spoil(7, AB + b" 257"), "line 7: rank 257; expected every rank from 0 to 256 once"),
        (spoil(7, b"AA== 6"), "line 7: the piece of rank 0 once more"),
        (spoil(7, b"QUI= 6"), "no line has the byte 0x06"),
        (lambda lines: [], "no line has the byte 0x00"),
    ],
)
def test_a_damaged_file_is_refused_by_line(
    tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], expected: str
) -> None:
    write(tmp_path, BYTES)
    file = tmp_path / "tiktoken.model"
    file.write_bytes(b"\n".join(change([*lines(BYTES), AB + b" 256"])))
    assert f"{file}: {expected}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (None, "expected added_tokens_decoder"),
        ({"x": {"content": "[X]"}}, "names the id 'x'; expected ids from 256 to 511"),
        ({"255": {"content": "[X]"}}, "names the id '255'; expected ids from 256 to 511"),
        ({"512": {"content": "[X]"}}, "names the id '512'; expected ids from 256 to 511"),
        ({"9" * 5000: {"content": "[X]"}}, "names the id '9999"),
        ({"256": "[X]"}, "256: expected an object with content"),
        ({"256": {"content": ""}}, "256: expected an object with content"),
        ({"256": {"content": "[X]", "special": 1}}, "256: expected an object with content"),
        ({"256": {"content": "a"}}, "256 is 'a', which is a piece of text or another token too"),
        ({"256": {"content": "[X]"}, "300": {"content": "[X]"}}, "300 is '[X]', which is"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, described: object, expected: str) -> None:
    write(tmp_path, BYTES, added_tokens_decoder=described)
    assert f"{tmp_path / 'tokenizer_config.json'}: " in refusal(tmp_path)
    assert expected in refusal(tmp_path)


def test_a_folder_that_does_not_say_how_it_cuts_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, BYTES, tokenizer_class="GPT2Tokenizer")
    assert "tokenizer_class is 'GPT2Tokenizer'; tiktoken.model is read as Kimi's" in refusal(
        tmp_path
    )
    (tmp_path / "tokenizer_config.json").unlink()
    assert "tiktoken.model needs it beside it" in refusal(tmp_path)


def test_a_name_for_bos_that_no_token_has_is_refused(tmp_path: Path) -> None:
    write(tmp_path, BYTES, bos_token="[SOS]")
    assert "bos_token is '[SOS]', which tiktoken.model does not hold" in refusal(tmp_path)


def test_tokenizer_json_is_taken_first(tmp_path: Path, ours: Tokenizer) -> None:
    write(tmp_path, BYTES)
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).digest == ours.digest
