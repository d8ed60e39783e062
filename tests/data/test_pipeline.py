"""The training iterator loses no token, keeps its weights and shares, and resumes exactly."""

import copy
import itertools
import json

import numpy as np
import pytest

from dsjax.config import DataConfig, SourceConfig
from dsjax.data import pipeline
from dsjax.data.batches import joined_state
from dsjax.data.pipeline import sample_texts, training_iterator
from dsjax.data.sources import open_corpus
from dsjax.data.tokenizer import EncodingError, load_tokenizer
from dsjax.errors import UserError

from .corpora import WRITERS, make_texts, write_jsonl, write_parquet, write_text


def config_of(*paths, weights=None, **settings) -> DataConfig:
    sources = [
        SourceConfig(kind=kind, path=path, weight=weight)
        for (kind, path), weight in zip(paths, weights or [1.0] * len(paths), strict=True)
    ]
    plain = {"sequence_length": 32, "fim_rate": 0.0, "shuffle_window": 1}
    return DataConfig(sources=sources, **plain | settings)


def iterate(config, tokenizer, **settings):
    settings = {"microbatch_size": 2, "seed": 5} | settings
    return training_iterator(open_corpus(config), tokenizer, config, **settings)


def documents_of(batches, tokenizer) -> list[tuple[int, ...]]:
    """The whole documents of a stream of batches, in order; what the end cuts off is dropped."""
    stream = [int(t) for batch in batches for t in batch["tokens"].ravel()]
    found, begin = [], 0
    for at, token in enumerate(stream):
        if token == tokenizer.eos_id:
            found.append(tuple(stream[begin : at + 1]))
            begin = at + 1
    return found


def ids_of(texts, tokenizer) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.document(tokenizer.encode(text)).tolist()) for text in texts]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_token_of_every_document_comes_once_an_epoch(kind, tokenizer, tmp_path):
    texts = make_texts(13)
    config = config_of((kind, WRITERS[kind](tmp_path, texts)))
    batches = itertools.islice(iterate(config, tokenizer), 60)
    documents = documents_of(batches, tokenizer)
    assert len(documents) >= 3 * 13
    epochs = [documents[i : i + 13] for i in (0, 13, 26)]
    assert all(sorted(epoch) == sorted(ids_of(texts, tokenizer)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_segments_are_the_documents_of_a_row(tokenizer, tmp_path):
    config = config_of(("text", write_text(tmp_path, make_texts(30))), sequence_length=64)
    boundaries = 0
    for batch in itertools.islice(iterate(config, tokenizer), 20):
        assert batch["tokens"].shape == batch["segment_ids"].shape == (2, 64)
        assert batch["tokens"].dtype == batch["segment_ids"].dtype == np.int32
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            starts = np.flatnonzero(tokens == tokenizer.bos_id)
            starts = starts[starts > 0]
            assert segments[0] == 1
            np.testing.assert_array_equal(np.flatnonzero(np.diff(segments)) + 1, starts)
            np.testing.assert_array_equal(segments[starts], 2 + np.arange(len(starts)))
            boundaries += len(starts)
    assert boundaries > 20


@pytest.mark.parametrize("window", [1, 4])
def test_a_resumed_iterator_equals_the_unbroken_one(window, tokenizer, tmp_path):
    texts = make_texts(25)
    # A document as long as two rows makes cuts at its end as well as inside.
    config = config_of(
        ("text", write_text(tmp_path / "a", [*texts, "x" * 62, "y" * 62])),
        ("parquet", write_parquet(tmp_path / "b", make_texts(9, seed=1))),
        weights=[2.0, 1.0],
        fim_rate=0.5,
        shuffle_window=window,
    )
    unbroken = iterate(config, tokenizer)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(unbroken.get_state()))
        batches.append(next(unbroken))
    windows = [p for s in states for p in json.loads(s)["position"]["0"]["parents"]]
    cuts = {p["parent_window_start_state"]["used"] for p in windows}
    assert 0 in cuts and len(cuts) > 10
    for cut in range(0, 40, 3):
        resumed = iterate(config, tokenizer)
        next(resumed)  # the position before restoring must not matter
        resumed.set_state(json.loads(states[cut]))
        for expected in batches[cut : cut + 20]:
            found = next(resumed)
            np.testing.assert_array_equal(found["tokens"], expected["tokens"])
            np.testing.assert_array_equal(found["segment_ids"], expected["segment_ids"])


def test_rows_of_a_long_document_are_spread_over_the_window(tokenizer, tmp_path):
    path = write_text(tmp_path, ["ax " * 500, "by " * 500])
    by_window = {}
    for window in (1, 64):
        config = config_of(("text", path), shuffle_window=window)
        batches = itertools.islice(iterate(config, tokenizer, microbatch_size=8), 8)
        by_window[window] = [batch["tokens"] for batch in batches]
    rows = {window: np.concatenate(batches).tolist() for window, batches in by_window.items()}
    assert rows[1] != rows[64] and sorted(rows[1]) == sorted(rows[64])

    def is_mixed(batch: np.ndarray) -> bool:
        text = tokenizer.decode(batch[batch > 4].tolist())
        return "a" in text and "b" in text

    assert sum(map(is_mixed, by_window[1])) < 4
    assert all(map(is_mixed, by_window[64]))


def test_the_largest_seed_lasts_for_more_than_one_window(tokenizer, tmp_path, monkeypatch):
    class Largest(np.random.SeedSequence):
        def spawn(self, n_children):
            return [Largest()] * n_children

        def generate_state(self, n_words, dtype=np.uint32):
            return np.full(n_words, 2**32 - 1, dtype)

    monkeypatch.setattr(np.random, "SeedSequence", Largest)
    config = config_of(("text", write_text(tmp_path, make_texts(5))))
    assert len(list(itertools.islice(iterate(config, tokenizer, microbatch_size=1), 4))) == 4


def test_documents_that_end_with_a_row_are_not_lost_by_a_resume(tokenizer, tmp_path):
    texts = [letter * 200 for letter in "abcdefgh"]
    length = len(tokenizer.document(tokenizer.encode(texts[0])))
    config = config_of(("text", write_text(tmp_path, texts)), sequence_length=length)
    unbroken = iterate(config, tokenizer, microbatch_size=1)
    rows, states = [], []
    for _ in range(16):
        states.append(json.dumps(unbroken.get_state()))
        rows.append(next(unbroken)["tokens"])
    for state, row in zip(states, rows, strict=True):
        resumed = iterate(config, tokenizer, microbatch_size=1)
        resumed.set_state(json.loads(state))
        np.testing.assert_array_equal(next(resumed)["tokens"], row)


@pytest.mark.parametrize(
    "change",
    ["corpus", "sequence_length", "fim_rate", "shuffle_window", "seed", "streams"],
)
def test_a_position_in_other_data_is_refused(change, tokenizer, tmp_path):
    config = config_of(("text", write_text(tmp_path, make_texts(5))))
    state = iterate(config, tokenizer).get_state()
    settings = {}
    if change == "corpus":
        (tmp_path / "0000.txt").write_text("changed")
    elif change == "seed":
        settings = {change: 2}
    else:
        config = config.model_copy(update={change: {"fim_rate": 1, "streams": 2}.get(change, 16)})
    with pytest.raises(UserError, match=f"cannot resume from a position in other data: {change} "):
        iterate(config, tokenizer, **settings).set_state(state)


def test_weights_are_shares_of_tokens_whatever_the_lengths(tokenizer, tmp_path):
    weights = [1.0, 2.0, 5.0]
    texts = [["a" * 5, "a" * 9], ["b" * 1000, "b" * 700], ["c" * 50, "c" * 70, "c" * 90]]
    config = config_of(
        *[("jsonl", write_jsonl(tmp_path / str(i), t)) for i, t in enumerate(texts)],
        weights=weights,
    )
    counts = np.zeros(3)
    for batch in itertools.islice(iterate(config, tokenizer), 200):
        for row in batch["tokens"]:
            text = tokenizer.decode(row[row > 4].tolist())
            counts["abc".index(text[0])] += 1
    np.testing.assert_allclose(counts / counts.sum(), np.array(weights) / 8, atol=0.01)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_rows_are_the_same_whoever_reads_them(streams, tokenizer, tmp_path):
    """One reader, then four, then two that share a row, each resuming where all before had been."""
    config = config_of(
        ("text", write_text(tmp_path, make_texts(9))),
        fim_rate=0.3,
        shuffle_window=4,
        streams=streams,
    )

    def readers(*rows):
        return [iterate(config, tokenizer, microbatch_size=4, rows=part) for part in rows]

    [alone] = readers(None)
    unbroken = [next(alone) for _ in range(24)]
    state, at = None, 0
    for rows in ([range(4)], [[0], [1], [2], [3]], [[0, 1, 2], [2, 3]]):
        some = readers(*rows)
        if state is not None:
            for reader in some:
                reader.set_state(json.loads(json.dumps(state)))
        for expected in unbroken[at : at + 8]:
            for reader, part in zip(some, rows, strict=True):
                found = next(reader)
                np.testing.assert_array_equal(found["tokens"], expected["tokens"][list(part)])
                np.testing.assert_array_equal(
                    found["segment_ids"], expected["segment_ids"][list(part)]
                )
        state, at = joined_state([reader.get_state() for reader in some]), at + 8


def test_streams_share_the_documents_disjointly_and_completely(tokenizer, tmp_path):
    texts = make_texts(8)
    config = config_of(("text", write_text(tmp_path, texts)), streams=4)
    batches = list(itertools.islice(iterate(config, tokenizer, microbatch_size=4), 60))
    rows = [[{"tokens": batch["tokens"][row]} for batch in batches] for row in range(4)]
    streams = [documents_of(row, tokenizer) for row in rows]
    epoch = [document for stream in streams for document in stream[:2]]
    assert sorted(epoch) == sorted(ids_of(texts, tokenizer))


def test_fill_in_the_middle_is_as_frequent_as_asked_and_drawn_anew(tokenizer, tmp_path):
    texts = make_texts(300, longest=10)
    config = config_of(("text", write_text(tmp_path, texts)), fim_rate=0.1, sequence_length=256)

    def stream(seed):
        batches = itertools.islice(iterate(config, tokenizer, seed=seed), 60)
        documents = documents_of(batches, tokenizer)
        return documents, [d[1] == tokenizer.fim_begin_id for d in documents]

    documents, reordered = stream(seed=5)
    count = len(documents)
    assert count > 900
    assert abs(sum(reordered) / count - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5
    plain = {d for d, is_reordered in zip(documents, reordered, strict=True) if not is_reordered}
    assert plain <= set(ids_of(texts, tokenizer))
    assert reordered[:300] != reordered[300:600]
    assert reordered[:300] != stream(seed=6)[1][:300]


def test_a_tokenizer_that_lacks_what_is_asked_is_refused_at_once(tokenizer, tmp_path):
    config = config_of(("text", write_text(tmp_path / "a", make_texts(3))), fim_rate=0.1)
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("fim▁end", "x"), encoding="utf-8")
    lacking = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has no <｜fim▁begin｜>"):
        iterate(config, lacking)
    iterate(config.model_copy(update={"fim_rate": 0.0}), lacking)


def test_broken_data_that_only_training_reads_are_a_user_error(tokenizer, tmp_path):
    path = write_text(tmp_path, make_texts(3))
    (tmp_path / "0001.txt").write_bytes(b"abc\xff")
    batches = iterate(config_of(("text", path), deduplicate=False), tokenizer)
    with pytest.raises(UserError, match=r"0001\.txt: byte 3 is 0xff"):
        for _ in range(20):
            next(batches)


def test_the_tokenizers_sample_is_training_text_by_weight(tmp_path):
    config = config_of(
        ("text", write_text(tmp_path / "a", [f"a{i:03}" for i in range(100)])),
        ("text", write_text(tmp_path / "b", [f"b{i:03}" for i in range(100)])),
        weights=[1.0, 3.0],
        held_out_fraction=0.1,
    )
    corpus = open_corpus(config)
    sample = list(sample_texts(corpus, max_bytes=160))
    assert [text[0] for text in sample] == ["a"] * 10 + ["b"] * 30
    assert sample == list(sample_texts(corpus, max_bytes=160))
    assert sample != sorted(sample)
    everything = list(sample_texts(corpus, max_bytes=10_000))
    assert len(everything) == len(set(everything)) == sum(len(s) for s in corpus.train)
    assert not set(everything) & set(corpus.held_out_texts())


def failing(tokenizer, sign: str):
    """A tokenizer that cannot encode documents with `sign` in them."""

    def encode(text: str) -> list[int]:
        if sign in text:
            raise EncodingError("too many line ends")
        return tokenizer.encode(text)

    found = copy.copy(tokenizer)
    found.encode = encode
    return found


def test_a_document_that_cannot_be_encoded_is_left_out_with_a_line(tokenizer, tmp_path, caplog):
    texts = [*make_texts(12), "BAD text"]
    config = config_of(("jsonl", write_jsonl(tmp_path, texts)))
    batches = itertools.islice(iterate(config, failing(tokenizer, "BAD")), 60)
    documents = documents_of(batches, tokenizer)
    assert (
        sorted(documents[:12]) == sorted(documents[12:24]) == sorted(ids_of(texts[:12], tokenizer))
    )
    said = "left out: a document that begins with 'BAD text': too many line ends"
    assert {record.getMessage() for record in caplog.records} == {said}


def test_a_source_that_cannot_be_encoded_at_all_ends_the_run(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MAX_FAILED", 50)
    config = config_of(("jsonl", write_jsonl(tmp_path, make_texts(5))))
    with pytest.raises(UserError, match="more than 50 documents in a row cannot be encoded; too"):
        next(iterate(config, failing(tokenizer, "")))
