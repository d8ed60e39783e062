"""Documents in a bucket are those of the same files on a disk, fetched in parts."""

import gzip
import json
import threading
from itertools import islice
from pathlib import Path

import pytest

from dsjax.config import DataConfig, SourceConfig
from dsjax.data import files
from dsjax.data.files import find_files
from dsjax.data.formats import open_documents
from dsjax.data.pipeline import sample_texts, training_iterator
from dsjax.data.sources import open_corpus
from dsjax.errors import UserError
from dsjax.places import REQUESTS
from tests.object_store import BUCKET, ObjectStore

from .corpora import WRITERS, make_texts

TEXTS = make_texts(40)
KINDS = ["text", "jsonl", "parquet"]


def source(kind: str, path: str) -> SourceConfig:
    return SourceConfig(kind=kind, path=path)  # pyright: ignore[reportArgumentType]


def config(kind: str, path: str, **settings) -> DataConfig:
    sources = [source(kind, path)]
    return DataConfig(sources=sources, sequence_length=16, shuffle_window=4, **settings)


def in_bucket(store: ObjectStore, folder: Path, pattern: str) -> str:
    """The same files in the bucket, and the same pattern there."""
    return pattern.replace(str(folder), store.put_folder("data", folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_in_a_bucket_is_that_of_the_same_files_on_a_disk(
    kind: str, store: ObjectStore, tmp_path: Path, tokenizer
) -> None:
    """Documents, names, split and fingerprint; and the rows that are trained on."""
    here = WRITERS[kind](tmp_path, TEXTS + TEXTS[:3])
    there = in_bucket(store, tmp_path, here)
    disk, bucket = (open_documents(source(kind, path)) for path in (here, there))
    assert list(bucket) == list(disk) == TEXTS + TEXTS[:3]
    assert [bucket[i] for i in (10, 0, 7)] == [TEXTS[i] for i in (10, 0, 7)]
    names = [[found.key(i) for i in range(len(found))] for found in (disk, bucket)]
    assert names[0] == names[1]
    local, remote = (open_corpus(config(kind, p, held_out_fraction=0.2)) for p in (here, there))
    assert remote.fingerprint == local.fingerprint
    assert list(remote.held_out_texts()) == list(local.held_out_texts())
    assert list(sample_texts(remote, 900)) == list(sample_texts(local, 900))
    rows = []
    for corpus in (local, remote):
        settings = config(kind, here, fim_rate=0.5)
        data = training_iterator(corpus, tokenizer, settings, microbatch_size=2, seed=3)
        rows.append([batch["tokens"].tolist() for batch in islice(data, 20)])
        data.close()
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "pattern",
    [
        "*.txt",
        "**/*.txt",
        "**",
        "b/*",
        "*/*.txt",
        ".hid/*",
        "**/.*",
        "b/c/d.txt",
        "[ab]*",
        "*/c/**",
    ],
)
def test_a_glob_means_the_same_files_in_a_bucket(
    pattern: str, store: ObjectStore, tmp_path: Path
) -> None:
    for name in ("a.txt", "b/z.txt", "b/c/d.txt", "b.md", ".hid/e.txt", "b/.f.txt", "b/c/e/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    here = f"{tmp_path}/{pattern}"
    local, remote = (
        find_files(where, "data.sources") for where in (here, in_bucket(store, tmp_path, here))
    )
    assert [(file.name, file.size) for file in remote] == [(f.name, f.size) for f in local]
    assert all(str(file.path).startswith(f"gs://{BUCKET}/data/") for file in remote)


def test_a_document_is_fetched_alone_and_a_file_in_blocks(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is for more than a block or a document, however long the file is."""
    monkeypatch.setattr(files, "_BLOCK", 1 << 14)
    lines = [json.dumps({"text": f"{i} " + "x" * 1000}) + "\n\n" for i in range(100)]
    store.put("a.jsonl", "".join(lines).encode())
    documents = open_documents(source("jsonl", f"gs://{BUCKET}/*.jsonl"))
    blocks = -(-len(store.objects["a.jsonl"]) // (1 << 14))
    # One more answers that there is nothing more.
    assert blocks <= store.seen["GET a.jsonl"] <= blocks + 1
    store.forget()
    assert documents[57] == f"57 {'x' * 1000}"
    assert store.sent["a.jsonl"] == len(lines[57])
    store.forget()
    assert len(list(documents)) == 100
    assert blocks <= store.seen["GET a.jsonl"] <= blocks + 1


def test_of_parquet_the_footer_and_one_column_of_a_group_are_fetched(
    store: ObjectStore, tmp_path: Path
) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({
        "text": [f"{i}" for i in range(4)],
        "other": [str(i) * 100_000 for i in range(4)],
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="none")
    store.put_folder("data", tmp_path)
    documents = open_documents(source("parquet", f"gs://{BUCKET}/data/a.parquet"))
    assert list(documents) == ["0", "1", "2", "3"]
    assert store.sent["data/a.parquet"] < 0.7 * len(store.objects["data/a.parquet"])


def test_documents_read_in_order_are_asked_for_several_at_a_time(
    store: ObjectStore, tmp_path: Path
) -> None:
    """The first answers wait until more have been asked for, and those are at most `REQUESTS`."""
    path = in_bucket(store, tmp_path, WRITERS["text"](tmp_path, TEXTS))
    documents = open_documents(source("text", path))
    asked, several = set(), threading.Event()

    def wait(method: str, name: str) -> None:
        asked.add(name)
        if len(asked) >= 4:
            several.set()
        assert several.wait(20)

    store.fail = wait
    assert list(documents) == TEXTS
    assert documents.threads == REQUESTS
    store.fail = lambda method, name: None
    store.forget()
    some = documents.read(iter(range(len(TEXTS))))
    assert next(some) == TEXTS[0]
    some.close()
    assert sum(store.seen.values()) <= REQUESTS + 1


@pytest.mark.parametrize(
    ("kind", "name", "data", "says"),
    [
        ("text", "a*", b"x\xff", "gs://models/a: byte 1 is 0xff"),
        ("jsonl", "a", b'{"text": "good"}\n\n{"tex": 1}\n', "gs://models/a:3: the keys are tex"),
        ("jsonl", "a", b'{"text": "ab\xff"}', "gs://models/a:1: byte 12 is 0xff"),
        ("parquet", "a", b"PAR1 no", "gs://models/a: cannot be read as parquet"),
        ("array_record", "a", b"", "gs://models/a: an ArrayRecord file .* must be on a disk"),
        ("text", "b*", b"x", r"gs://models/b\*: no file matches"),
        ("text", "a/b", b"x", r"gs://models/a/b: no file matches"),
        ("text", "", b"x", r"gs://models: is a folder; expected a glob such as gs://models/\*\*"),
    ],
)
def test_broken_data_in_a_bucket_are_named_in_one_line(
    kind: str, name: str, data: bytes, says: str, store: ObjectStore
) -> None:
    store.put("a", data)
    with pytest.raises(UserError, match=says) as caught:
        open_corpus(config(kind, f"gs://{BUCKET}/{name}"))
    assert "\n" not in str(caught.value)


def test_compressed_files_and_names_with_brackets_are_read_in_a_bucket(
    store: ObjectStore, tmp_path: Path
) -> None:
    """As on a disk: a byte order mark is no text, and brackets are a name where one exists."""
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode("utf-8-sig")
    (tmp_path / "[old]").mkdir()
    for name in ("a[1].jsonl.gz", "a1.jsonl.gz", "[old]/b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines))
    folder = store.put_folder("data", tmp_path)
    for name in ("a[1].jsonl.gz", "[old]/b.jsonl.gz", "[old]/*"):
        documents = open_documents(source("jsonl", f"{folder}/{name}"))
        assert [documents[i] for i in (10, 0, 7)] == [TEXTS[i] for i in (10, 0, 7)]
        assert list(documents) == TEXTS
    assert [file.name for file in find_files(f"{folder}/a[12].*", "data.sources")] == [
        "a1.jsonl.gz"
    ]


@pytest.mark.parametrize("path", ["gs://*/a.txt", "gs://[b]/*"])
def test_a_pattern_for_the_bucket_itself_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="with a bucket that is no pattern"):
        find_files(path, "data.sources")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_store_refuses_is_said_as_it_is(
    kind: str, store: ObjectStore, tmp_path: Path
) -> None:
    path = in_bucket(store, tmp_path, WRITERS[kind](tmp_path, TEXTS[:3]))
    store.fail = lambda method, name: (403, "no storage.objects.get access") if name else None
    with pytest.raises(UserError, match=r"^gs://models/data/\S+: permission denied .*log in by"):
        list(open_documents(source(kind, path)))
