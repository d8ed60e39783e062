"""Held-out rows predict every token once, and the baselines are what the compressors give."""

import gzip
import lzma
import math

import numpy as np
import pytest

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.held_out import compression_baselines, held_out_rows
from dsjax.data.sources import Corpus, open_corpus

from .corpora import make_texts, write_text


class NumberingTokenizer:
    """Gives every token of every document a number of its own, so that it can be found again."""

    def __init__(self):
        self.documents: list[np.ndarray] = []
        self._next = 1

    def encode(self, text: str) -> list[int]:
        return list(range(len(text)))

    def document(self, ids: list[int]) -> np.ndarray:
        numbers = self._next + np.arange(len(ids) + 2, dtype=np.int32)
        self._next += len(numbers)
        self.documents.append(numbers)
        return numbers


def corpus_of(folder, texts) -> Corpus:
    """A corpus that holds out all of `texts`."""
    write_text(folder, texts)
    source = SourceConfig(path=f"{folder}/*.txt")
    everything = open_corpus(DataConfig(sources=[source], sequence_length=8))
    return Corpus(train=(), held_out=everything.train, fingerprint="")


@pytest.mark.parametrize("length", [2, 3, 8, 17])
def test_every_token_is_predicted_once_from_its_own_document(length, tmp_path):
    texts = [chr(97 + i) * size for i, size in enumerate([1, 2, 3, 5, 6, 7, 8, 13, 14, 15, 16, 99])]
    tokenizer = NumberingTokenizer()
    rows = held_out_rows(corpus_of(tmp_path, texts), tokenizer, length)
    assert rows.num_bytes == sum(map(len, texts))
    row, at = np.nonzero(rows.scored)
    assert at.max() < length - 1
    targets = rows.tokens[row, at + 1]
    expected = np.concatenate([document[1:] for document in tokenizer.documents])
    np.testing.assert_array_equal(np.sort(targets), np.sort(expected))
    np.testing.assert_array_equal(rows.tokens[row, at], targets - 1)
    np.testing.assert_array_equal(rows.segment_ids[row, at], rows.segment_ids[row, at + 1])
    assert (rows.segment_ids[row, at] > 0).all()
    padding = rows.segment_ids == 0
    assert not rows.tokens[padding].any() and not rows.scored[padding].any()


def test_predictions_see_the_beginning_or_half_a_row(tmp_path):
    length = 16
    tokenizer = NumberingTokenizer()
    rows = held_out_rows(corpus_of(tmp_path, ["x" * 200, "y" * 5, "z" * 3]), tokenizer, length)
    begins = {int(document[0]) for document in tokenizer.documents}
    for tokens, segments, scored in zip(rows.tokens, rows.segment_ids, rows.scored, strict=True):
        for at in np.flatnonzero(scored):
            begin = int(np.flatnonzero(segments == segments[at])[0])
            assert int(tokens[begin]) in begins or at + 1 - begin >= length // 2


def test_short_documents_share_rows(tmp_path):
    rows = held_out_rows(corpus_of(tmp_path, list("abcdefgh")), NumberingTokenizer(), 12)
    assert rows.tokens.shape == (2, 12)
    assert all(set(segments) == {1, 2, 3, 4} for segments in rows.segment_ids.tolist())


def test_held_out_text_is_that_of_the_corpus(tokenizer, tmp_path):
    texts = make_texts(30)
    rows = held_out_rows(corpus_of(tmp_path, texts), tokenizer, sequence_length=4096)
    found = []
    for tokens, segments in zip(rows.tokens, rows.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            bos, *ids, eos = tokens[segments == segment].tolist()
            assert (bos, eos) == (tokenizer.bos_id, tokenizer.eos_id)
            found.append(tokenizer.decode(ids))
    assert sorted(found) == sorted(texts)
    assert rows.num_bytes == len("".join(texts).encode())


def test_a_byte_guessed_uniformly_costs_eight_bits(tmp_path):
    rows = held_out_rows(corpus_of(tmp_path, ["ab", "c"]), NumberingTokenizer(), 8)
    assert rows.bits_per_byte(rows.num_bytes * math.log(256)) == pytest.approx(8.0)


def test_baselines_are_those_of_gzip_and_xz_on_one_stream(tmp_path):
    texts = make_texts(60, longest=2000)
    stream = "".join(texts).encode()
    assert compression_baselines(corpus_of(tmp_path, texts)) == {
        "gzip -9": 8 * len(gzip.compress(stream, 9)) / len(stream),
        "xz -9e": 8 * len(lzma.compress(stream, preset=9 | lzma.PRESET_EXTREME)) / len(stream),
    }
