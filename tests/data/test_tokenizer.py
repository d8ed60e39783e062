"""Any text survives its tokenizer, and a tokenizer survives its file."""

import json
import random

import pytest

from dsjax.data.tokenizer import BOS, EOS, Tokenizer, load_tokenizer, train_tokenizer
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
