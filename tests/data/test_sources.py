"""What is held out is never trained on, and a corpus is known by its fingerprint."""

import shutil

import pytest

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.formats import TextFiles
from dsjax.data.sources import open_corpus
from dsjax.errors import UserError

from .corpora import WRITERS, make_texts, write_jsonl, write_text


def config(*sources, **settings) -> DataConfig:
    return DataConfig(sources=list(sources), sequence_length=16, **settings)


def text_source(path: str, weight: float = 1.0) -> SourceConfig:
    return SourceConfig(path=path, weight=weight)


def trained(corpus) -> list[str]:
    return [text for selection in corpus.train for text in selection]


def test_of_equal_documents_only_the_first_is_kept_across_sources(tmp_path):
    first = write_text(tmp_path / "a", ["one", "two", "one", ""])
    second = write_jsonl(tmp_path / "b", ["two", "three", "three", ""])
    sources = text_source(first), SourceConfig(kind="jsonl", path=second)
    corpus = open_corpus(config(*sources))
    assert [list(selection) for selection in corpus.train] == [["one", "two"], ["three"]]


@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_no_held_out_content_is_trained_on(kind, deduplicate, tmp_path):
    texts = make_texts(60, longest=20)
    path = WRITERS[kind](tmp_path, texts + texts[::-1] + texts)
    source = SourceConfig(kind=kind, path=path)
    corpus = open_corpus(config(source, held_out_fraction=0.2, deduplicate=deduplicate))
    held_out = list(corpus.held_out_texts())
    assert held_out
    assert not set(held_out) & set(trained(corpus))
    assert set(held_out) | set(trained(corpus)) == set(texts)
    if deduplicate:
        assert len(held_out) + len(trained(corpus)) == len(texts)


def test_the_split_follows_names_alone_in_about_the_asked_fraction(tmp_path):
    write_text(tmp_path / "a", make_texts(400, longest=5))
    write_text(tmp_path / "b", make_texts(400, seed=1, longest=5))

    def held_out_names(folder):
        corpus = open_corpus(config(text_source(f"{folder}/*.txt"), held_out_fraction=0.1))
        (selection,) = corpus.held_out
        return [selection.documents.key(int(i)) for i in selection.indices]

    names = held_out_names(tmp_path / "a")
    assert names == held_out_names(tmp_path / "b")
    assert 20 <= len(names) <= 60
    (tmp_path / "a" / "0000b.txt").write_text("a new file moves no other")
    assert set(names) <= set(held_out_names(tmp_path / "a"))


def test_the_standard_library_splits_without_a_leak():
    corpus = open_corpus(config(text_source("python-stdlib"), held_out_fraction=0.02))
    held_out = set(corpus.held_out_texts())
    texts = trained(corpus)
    assert len(texts) == len(set(texts)) > 500
    assert 5 < len(held_out) < 0.05 * len(texts)
    assert not held_out & set(texts)
    assert sum(map(len, texts)) > 10_000_000


def test_a_split_with_an_empty_side_is_an_error(tmp_path):
    one = text_source(write_text(tmp_path / "a", ["alone"]))
    two = text_source(write_text(tmp_path / "b", ["other", "alone"]))
    with pytest.raises(
        UserError, match=r"none of its 1 documents is left to train on.* holds out 1"
    ):
        open_corpus(config(one, held_out_fraction=0.999999))
    with pytest.raises(UserError, match=r"held_out_fraction=1e-09 holds out none of 2 documents"):
        open_corpus(config(two, held_out_fraction=1e-9))
    with pytest.raises(UserError, match=r"a/\*\.txt: none of its 1 documents is left"):
        open_corpus(config(two, one))


def test_the_fingerprint_is_that_of_the_data_wherever_they_lie(tmp_path):
    path = write_text(tmp_path / "a", ["one", "two"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    here = open_corpus(config(text_source(path))).fingerprint
    assert here == open_corpus(config(text_source(f"{tmp_path}/b/*.txt"))).fingerprint


def test_the_fingerprint_changes_with_the_data(tmp_path):
    seen = []

    def note(*sources, **settings):
        seen.append(open_corpus(config(*sources, **settings)).fingerprint)

    path = write_text(tmp_path / "a", make_texts(20))
    source = text_source(path)
    note(source)
    note(text_source(path, weight=2.0))
    note(source, source.model_copy(update={"path": write_text(tmp_path / "b", ["more"])}))
    note(source, deduplicate=False)
    note(source, held_out_fraction=0.3)
    note(source, held_out_fraction=0.31)
    (tmp_path / "a" / "0003.txt").write_text("changed")
    note(source)
    (tmp_path / "a" / "0003.txt").write_text("Changed")
    note(source)
    (tmp_path / "a" / "0003.txt").rename(tmp_path / "a" / "0003b.txt")
    note(source)
    (tmp_path / "a" / "0003b.txt").unlink()
    note(source)
    assert len(set(seen)) == len(seen)


def test_nothing_is_read_where_nothing_is_compared(tmp_path, monkeypatch):
    source = text_source(write_text(tmp_path, ["one", "one"]))
    monkeypatch.setattr(TextFiles, "__getitem__", lambda *_: pytest.fail("a document was read"))
    corpus = open_corpus(config(source, deduplicate=False))
    assert len(corpus.train[0]) == 2
    assert not list(corpus.held_out_texts())
