"""Every format gives the same documents, and broken data are named in one line."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.files import find_files, standard_library_files
from dsjax.data.formats import open_documents
from dsjax.data.sources import open_corpus
from dsjax.errors import UserError

from .corpora import WRITERS, make_texts, write_array_record, write_parquet, write_text

TEXTS = make_texts(11)


@pytest.mark.parametrize("kind", WRITERS)
def test_each_format_yields_the_same_documents_in_order(kind, tmp_path):
    documents = open_documents(SourceConfig(kind=kind, path=WRITERS[kind](tmp_path, TEXTS)))
    assert list(documents) == TEXTS
    assert [documents[i] for i in (10, 0, 7)] == [TEXTS[i] for i in (10, 0, 7)]
    assert len({documents.key(i) for i in range(len(TEXTS))}) == len(TEXTS)
    assert sum(documents.blocks) == len(TEXTS)


def test_a_record_is_named_by_its_file_below_the_root_and_its_number(tmp_path):
    write_parquet(tmp_path / "x", TEXTS)
    documents = open_documents(SourceConfig(kind="parquet", path=f"{tmp_path}/**/*.parquet"))
    assert documents.key(0) == "x/a.parquet:0"
    assert documents.key(10) == "x/b.parquet:4"
    assert documents.blocks == [3, 3, 3, 2]


def test_files_come_in_the_order_of_their_names_below_the_root(tmp_path):
    for name in ("b/z.txt", "a.txt", "b/c/d.txt", "b.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [file.name for file in find_files(f"{tmp_path}/**/*.txt", "data.sources")]
    assert names == ["a.txt", "b/c/d.txt", "b/z.txt"]
    assert [file.name for file in find_files(f"{tmp_path}/b/z.txt", "data.sources")] == ["z.txt"]


def test_bytes_survive_reading_but_for_a_byte_order_mark(tmp_path):
    text = "line\r\nline\rline\n\0\ufeff"
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8-sig"))
    assert open_documents(SourceConfig(path=f"{tmp_path}/a.txt"))[0] == text


def test_the_standard_library_is_its_own_python_files_and_utf8():
    files = standard_library_files()
    names = [file.name for file in files]
    assert names == sorted(set(names))
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)
    assert all(file.path.is_relative_to(sysconfig.get_path("stdlib")) for file in files)
    for file in files:
        file.path.read_bytes().decode()


def _jsonl(line: bytes):
    """A good line, a blank one, and then `line`: the third of the file."""

    def write(folder: Path) -> str:
        (folder / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
        return f"{folder}/a.jsonl"

    return write


def _bytes(name: str, data: bytes):
    def write(folder: Path) -> str:
        (folder / name).write_bytes(data)
        return f"{folder}/{name}"

    return write


def _table(columns: dict):
    def write(folder: Path) -> str:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
        return f"{folder}/a.parquet"

    return write


def _record(data: bytes):
    def write(folder: Path) -> str:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
        for record in (b"good", data):
            writer.write(record)
        writer.close()
        return f"{folder}/a.array_record"

    return write


@pytest.mark.parametrize(
    ("kind", "write", "expected"),
    [
        ("text", lambda folder: f"{folder}/*.txt", ["*.txt: no file matches"]),
        ("text", lambda folder: str(folder), ["is a folder", "/**/*.txt"]),
        ("text", _bytes("a.txt", b""), ["a.txt: all 1 documents are empty"]),
        ("text", _bytes("a.txt", b"abc\xff"), ["a.txt: byte 3 is 0xff", "not UTF-8"]),
        ("jsonl", _bytes("a.jsonl", b"\n \n"), ["a.jsonl: 1 files hold no document"]),
        ("jsonl", _bytes("a.jsonl", b'{"text": ""}'), ["all 1 documents are empty"]),
        ("jsonl", _jsonl(b'{"text": "ab\xff"}'), ["a.jsonl:3: byte 30 is 0xff"]),
        ("jsonl", _jsonl(b'{"text": "ab'), ["a.jsonl:3: not JSON (", "column 13"]),
        ("jsonl", _jsonl(b"[" * 100_000), ["a.jsonl:3: not JSON"]),
        ("jsonl", _jsonl(b'["text"]'), ["a.jsonl:3: a JSON list"]),
        ("jsonl", _jsonl(b'{"b": 1, "a": 2}'), ["a.jsonl:3: the keys are a, b", "'text'"]),
        ("jsonl", _jsonl(b'{"text": null}'), ["a.jsonl:3: 'text' holds a NoneType"]),
        ("jsonl", _jsonl(b'{"text": "\\ud800"}'), ["a.jsonl:3: 'text' holds half of a surrogate"]),
        ("parquet", _bytes("a.parquet", b"PAR1 no"), ["a.parquet: cannot be read as parquet"]),
        ("parquet", _table({"a": ["x"], "b": ["y"]}), ["no column 'text'", "columns are a, b"]),
        ("parquet", _table({"text": [1]}), ["column 'text' holds int64; expected string"]),
        ("parquet", _table({"text": ["x", None]}), ["row 1 of column 'text' is null"]),
        ("array_record", _bytes("a", b"no record"), ["a: cannot be read as ArrayRecord"]),
        ("array_record", _record(b"ab\xff"), ["a.array_record: byte 2 of record 1 is not UTF-8"]),
    ],
)
def test_broken_data_are_named_in_one_line(kind, write, expected, tmp_path):
    source = SourceConfig(kind=kind, path=write(tmp_path))
    with pytest.raises(UserError) as caught:
        open_corpus(DataConfig(sources=[source], sequence_length=8))
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("kind", "write", "module", "package"),
    [
        ("parquet", write_parquet, "pyarrow", "pyarrow"),
        (
            "array_record",
            write_array_record,
            "array_record.python.array_record_data_source",
            "array-record",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    kind, write, module, package, tmp_path, monkeypatch
):
    path = write(tmp_path, TEXTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {package}; pip install 'dsjax\[data\]'"):
        open_documents(SourceConfig(kind=kind, path=path))


def test_text_key_names_the_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    source = SourceConfig(kind="jsonl", path=f"{tmp_path}/a.jsonl", text_key="body")
    assert list(open_documents(source)) == ["yes"]


def test_opening_text_reads_nothing(tmp_path):
    path = write_text(tmp_path, TEXTS)
    (tmp_path / "0001.txt").write_bytes(b"\xff")
    documents = open_documents(SourceConfig(path=path))
    assert documents[0] == TEXTS[0]
    with pytest.raises(UserError, match=r"0001\.txt: byte 0 is 0xff"):
        documents[1]
