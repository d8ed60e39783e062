"""Fill-in-the-middle loses nothing."""

import numpy as np
import pytest

from dsjax.data.fim import fill_in_the_middle, split_in_three
from dsjax.data.tokenizer import load_tokenizer
from dsjax.errors import UserError

from .corpora import make_texts


def test_prefix_suffix_and_middle_recompose_to_the_text(tokenizer):
    for number, text in enumerate(["", "x", *make_texts(50)]):
        ids = fill_in_the_middle(text, tokenizer, np.random.default_rng(number))
        hole, end = ids.index(tokenizer.fim_hole_id), ids.index(tokenizer.fim_end_id)
        assert ids[0] == tokenizer.fim_begin_id
        prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
        assert "".join(map(tokenizer.decode, (prefix, middle, suffix))) == text


def test_cuts_fall_everywhere_between_characters():
    text = "ä中😀"
    random = np.random.default_rng(0)
    seen = {split_in_three(text, random) for _ in range(500)}
    assert all("".join(parts) == text for parts in seen)
    assert len(seen) == 10  # two of four places, order apart, the same one allowed


def test_a_tokenizer_without_the_tokens_is_an_error(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("fim▁hole", "x"), encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer has no <｜fim▁begin｜>.*fim_rate=0"):
        fill_in_the_middle("text", load_tokenizer(tmp_path), np.random.default_rng(0))
