"""Added tokens, special tokens and bos are read from a folder as transformers reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from dsjax.data.language import read_language
from dsjax.data.tokenizer import BOS, EOS, Tokenizer, load_tokenizer
from dsjax.errors import UserError

FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **FLAGS, **flags}


def folder_with(tokenizer: Tokenizer, folder: Path, *, added=(), post=None, **config: Any) -> Path:
    """A released folder: `added` stands in tokenizer.json, the rest in tokenizer_config.json."""
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(list(added))
    if post is not None:
        backend.post_processor = post
    backend.save(str(folder / "tokenizer.json"))
    written = {"bos_token": BOS, "eos_token": EOS, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def test_tokens_that_only_the_config_has_are_added_at_their_ids(tokenizer, tmp_path):
    first = tokenizer.vocab_size
    decoder = {str(first + 1): token("</think>"), str(first): token("<think>")}
    folder = folder_with(tokenizer, tmp_path, added_tokens_decoder=decoder)
    loaded = load_tokenizer(folder)
    assert loaded.added_tokens["<think>"] == first and loaded.vocab_size == first + 2
    ids = read_language(folder).text("a <think>b</think>")
    assert [i for i in ids if i >= first] == [first, first + 1]
    assert loaded.decode(ids) == "a <think>b</think>"


@pytest.mark.parametrize("offset", [-3, 5])
def test_a_token_with_two_ids_is_refused(tokenizer, tmp_path, offset):
    first = tokenizer.vocab_size
    decoder = {str(first + offset): token("<think>")}
    added = [AddedToken("<think>", normalized=False)]
    folder = folder_with(tokenizer, tmp_path, added=added, added_tokens_decoder=decoder)
    with pytest.raises(UserError, match=rf"has the id {first + offset}, but has {first} by"):
        load_tokenizer(folder)


def test_a_token_whose_id_is_not_free_is_refused(tokenizer, tmp_path):
    first = tokenizer.vocab_size
    for number in (7, first + 1):
        decoder = {str(number): token("<think>")}
        folder = folder_with(tokenizer, tmp_path, added_tokens_decoder=decoder)
        with pytest.raises(UserError, match=rf"has the id {number}, but would get {first} by"):
            load_tokenizer(folder)


def test_flags_of_the_config_win(tokenizer, tmp_path):
    first = tokenizer.vocab_size
    decoder = {str(first): token("<|end|>", rstrip=True, special=True)}
    added = [AddedToken("<|end|>", normalized=False)]
    folder = folder_with(tokenizer, tmp_path, added=added, added_tokens_decoder=decoder)
    loaded = load_tokenizer(folder)
    assert first in loaded.special_ids
    after = loaded.encode("b")
    assert loaded.encode_prompt("<|end|>  \n b").ids == [first, *after]
    assert first not in loaded.encode("<|end|>")


def test_folders_from_before_added_tokens_decoder_are_read(tokenizer, tmp_path):
    first = tokenizer.vocab_size
    folder = folder_with(tokenizer, tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": first + 1, "<a>": first}))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<b>"}, "pad_token": "[PAD]"})
    )
    loaded = load_tokenizer(folder)
    assert (loaded.added_tokens["<a>"], loaded.eos_id) == (first, first + 1)
    assert loaded.special_ids >= {first + 1} and first not in loaded.special_ids
    assert "[PAD]" not in loaded.added_tokens


def test_named_tokens_are_special(tokenizer, tmp_path):
    first = tokenizer.vocab_size
    added = [AddedToken(name, normalized=False) for name in ("<|end|>", "<img>", "<think>")]
    folder = folder_with(
        tokenizer, tmp_path, added=added, eos_token="<|end|>", image_token="<img>",
        additional_special_tokens=["<new>"],
    )  # fmt: skip
    loaded = load_tokenizer(folder)
    assert loaded.special_ids >= {first, first + 1, first + 3}
    assert first + 2 not in loaded.special_ids
    assert loaded.added_tokens["<new>"] == first + 3


@pytest.mark.parametrize(
    "decoder, message",
    [
        ([], "expected added_tokens_decoder to be tokens by their ids"),
        ({"x": token("<a>")}, "expected ids as keys, found 'x'"),
        ({"300": {"special": True}}, "added_tokens_decoder: 300: expected an object with content"),
        ({"300": token("")}, "added_tokens_decoder: 300: expected an object with content"),
        ({"300": token("<a>") | {"lstrip": 1}}, "300: lstrip is 1; expected true or false"),
    ],
)
def test_a_damaged_decoder_is_one_line(tokenizer, tmp_path, decoder, message):
    folder = folder_with(tokenizer, tmp_path, added_tokens_decoder=decoder)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def bos_template(**kwargs: Any) -> TemplateProcessing:
    return TemplateProcessing(f"{BOS} $A", None, [(BOS, 0)])


@pytest.mark.parametrize(
    "post, config, begins",
    [
        (None, {}, False),
        (ByteLevel(), {}, False),
        (None, {"add_bos_token": True}, True),
        (None, {"add_bos_token": False}, False),
        (bos_template(), {}, True),
        (Sequence([ByteLevel(), bos_template()]), {}, True),
        (bos_template(), {"add_bos_token": False}, True),
        (None, {"add_bos_token": True, "bos_token": None}, False),
    ],
)
def test_bos_stands_before_a_text_where_the_files_say_so(tokenizer, tmp_path, post, config, begins):
    folder = folder_with(tokenizer, tmp_path, post=post, model_max_length=9, **config)
    assert (read_language(folder).text("some words")[0] == 0) is begins


def test_texts_of_our_own_runs_begin_with_bos(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert read_language(tmp_path).add_bos
    before = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(before))
    assert read_language(tmp_path).add_bos


def test_bos_is_not_doubled(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert read_language(tmp_path).text(f"{BOS}a").count(0) == 1
