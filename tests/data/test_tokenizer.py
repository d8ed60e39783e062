"""Any text survives its tokenizer, and a tokenizer survives its file."""

import copy
import hashlib
import json
import random
import time
from pathlib import Path

import pytest
import tokenizers

from dsjax.data.tokenizer import (
    BOS,
    EOS,
    EncodingError,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from dsjax.errors import UserError
from tests.object_store import BUCKET

from .corpora import make_texts

CODE = "def f(x):\n    if x > 1234567:\n        return x\n\n\treturn f(x+1)  # 12\n"


def test_any_text_survives_encoding(tokenizer):
    draw = random.Random(0)
    planes = [range(0x80), range(0x80, 0xD800), range(0xE000, 0x110000)]
    for _ in range(200):
        text = "".join(chr(draw.choice(draw.choice(planes))) for _ in range(draw.randrange(40)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_gives_deepseeks_special_tokens_their_places(tokenizer):
    assert [tokenizer.decode([i]) for i in range(5)] == [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
    ]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id) == (2, 3, 4)


def test_training_is_deterministic_and_keeps_to_the_vocabulary():
    texts = [*make_texts(200), CODE]
    first, again = (train_tokenizer(iter(texts), vocab_size=400) for _ in range(2))
    assert first.digest == again.digest
    assert first.vocab_size == 400
    assert max(first.encode("".join(texts))) < 400
    assert train_tokenizer(texts, vocab_size=401).digest != first.digest


def test_digits_come_in_threes_and_indentation_in_one_piece():
    tokenizer = train_tokenizer([CODE] * 3, vocab_size=1000)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(CODE)]
    assert [piece for piece in pieces if piece.isdigit()][:3] == ["123", "456", "7"]
    assert [piece for piece in pieces if "\n  " in piece] == ["):\n   ", ":\n       "]


def test_a_special_token_spelled_in_a_document_stays_text(tokenizer):
    text = f"a {EOS} b {BOS}"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_a_document_stands_between_bos_and_eos(tokenizer):
    assert tokenizer.document([7, 8]).tolist() == [0, 7, 8, 1]


def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.digest == tokenizer.digest
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
        assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, tokenizer.vocab_size)
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def with_config(tokenizer: Tokenizer, folder, config: object) -> Tokenizer:
    tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def test_the_folders_config_names_bos_and_eos(tokenizer, tmp_path):
    fim = "<｜fim▁end｜>"
    named = with_config(tokenizer, tmp_path, {"bos_token": None, "eos_token": {"content": fim}})
    assert (named.bos_id, named.eos_id) == (None, 4)
    assert named.digest != tokenizer.digest
    assert named.document([7]).tolist() == [4, 7, 4]
    silent = with_config(tokenizer, tmp_path, {"model_max_length": 5})
    assert (silent.bos_id, silent.eos_id) == (0, 1)


def test_a_document_needs_an_end(tokenizer, tmp_path):
    endless = with_config(tokenizer, tmp_path, {"eos_token": None})
    with pytest.raises(UserError, match="no end-of-sentence token"):
        endless.document([7])


def test_what_a_file_says_of_truncation_and_padding_is_not_done(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(tree), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode(CODE) == tokenizer.encode(CODE)


def test_a_missing_or_damaged_tokenizer_is_named_in_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no tokenizer; expected a tokenizer\.json or"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is '<x>', which"):
        with_config(tokenizer, tmp_path, {"eos_token": "<x>"})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token is {'id': 1}, which"):
        with_config(tokenizer, tmp_path, {"eos_token": {"id": 1}})
    with pytest.raises(UserError, match="expected a JSON object, found list"):
        with_config(tokenizer, tmp_path, [])
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9] + b"\xff")
        with pytest.raises(UserError, match=f"{name}: (cannot be read as|not the JSON)") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
        tokenizer.save(tmp_path)


def test_a_vocabulary_below_the_bytes_is_an_error():
    with pytest.raises(UserError, match=r"vocab_size=260 is too small.* need 261"):
        train_tokenizer(["x"], vocab_size=260)
    assert train_tokenizer(["x"], vocab_size=261).vocab_size == 261


def test_a_tokenizer_is_saved_into_a_bucket(tokenizer, store):
    tokenizer.save(f"gs://{BUCKET}/run/tokenizer")
    assert load_tokenizer(f"gs://{BUCKET}/run").digest == tokenizer.digest


@pytest.mark.parametrize(
    "run", ["\n", "\r\n", "\n ", " ", "\t\n", "a", "1", "!", "e\u0301", "\u0301", "\0", "中"]
)
def test_long_runs_are_encoded_in_linear_time(tokenizer, run):
    text = f"x{run * (100_000 // len(run))}y"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_tokenizer_is_trained_on_long_runs_of_line_ends():
    tokenizer = train_tokenizer(["words" + "\n" * 5_000 + "words"], 300)
    assert tokenizer.decode(tokenizer.encode("words\n\n\nwords")) == "words\n\n\nwords"


PATTERN_OF_OLDER_RUNS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+(?:[\r\n]+[ \t]*(?=[ \t]))?"
    r"|\s*[\r\n]+[ \t]*(?=[ \t])|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def as_saved_before(tokenizer: Tokenizer, folder: Path) -> Path:
    """The tokenizer in the form in which older runs have it."""
    tokenizer.save(folder)
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = PATTERN_OF_OLDER_RUNS
    file.write_text(json.dumps(tree), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizers_of_older_runs_encode_as_they_did(tokenizer, tmp_path):
    folder = as_saved_before(tokenizer, tmp_path)
    before = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    after = load_tokenizer(folder)
    draw = random.Random(0)
    for alphabet in ("\n\r \t!a", "\n\r \t\x0b\xa0!", "\n \t\r\u2028é\u0301\x00😀中_-'1a"):
        for _ in range(500):
            text = "".join(draw.choices(alphabet, k=draw.randrange(25)))
            assert after.encode(text) == before.encode(text).ids, repr(text)
    assert after.encode("\n" * 5_000)  # the older pattern tries too much


def test_deepseek_v2s_pattern_for_white_space_is_read_as_a_linear_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = r"\s+$"
    file.write_text(json.dumps(tree), encoding="utf-8")
    before = tokenizers.Tokenizer.from_file(str(file))
    after = load_tokenizer(tmp_path)
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("\n \t\xa0a1", k=draw.randrange(12)))
        assert after.encode(text) == before.encode(text).ids, repr(text)
    begin = time.perf_counter()
    after.encode(" " * 100_000 + "1")
    assert time.perf_counter() - begin < 2


def test_the_digest_of_older_runs_stays(tokenizer, tmp_path):
    folder = as_saved_before(tokenizer, tmp_path)
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    described = {"tokenizer": tree, "bos": 0, "eos": 1}
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    assert load_tokenizer(folder).digest == tokenizer.digest == digest


def test_what_the_library_throws_is_an_error_of_that_text_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = PATTERN_OF_OLDER_RUNS + "|x"
    file.write_text(json.dumps(tree), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    with pytest.raises(EncodingError, match=r"a text of 5,000 characters: .*limit"):
        loaded.encode("\n" * 5_000)
    with pytest.raises(EncodingError, match="half of a surrogate pair"):
        loaded.encode("x\ud83dy")
    assert loaded.decode(loaded.encode("aab")) == "aab"


def test_a_signal_is_no_error_of_a_text(tokenizer):
    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    ours = copy.copy(tokenizer)
    ours._backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        ours.encode("x")
