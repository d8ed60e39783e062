"""Files are read the same by every task: compressed or not, with a byte order mark, or damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dsjax.config import DataConfig, SourceConfig
from dsjax.config_grpo import PromptsConfig
from dsjax.data import formats, lines
from dsjax.data.conversations import read_conversations
from dsjax.data.files import find_files
from dsjax.data.formats import open_documents
from dsjax.data.records import column, read_rows
from dsjax.data.sources import open_corpus
from dsjax.errors import UserError
from dsjax.posttraining.prompts import open_questions

MARK = "\ufeff".encode()
ODD = "a\u2028b\x85c\x0bd 'e'"
"""What Python's str.splitlines takes for line ends, and a JSON string may hold."""

ROWS = [
    {"text": f"{ODD} {n}", "prompt": f"{ODD} {n}", "completion": "yes", "answer": str(n)}
    for n in range(5)
]


def pretraining(path: Path) -> list[str]:
    return list(open_documents(SourceConfig(kind="jsonl", path=str(path))))


def tuning(path: Path) -> list[str]:
    return [one.messages[0]["content"] for one in read_conversations([str(path)])]


def prompts(path: Path) -> list[str]:
    found: list[str] = []
    open_questions(PromptsConfig(path=str(path)), lambda row, _: found.append(row["prompt"]), 0)
    return found


def evaluation(path: Path) -> list[str]:
    return [column(row, "prompt") for _, row in read_rows(path)]


READERS = [pretraining, tuning, prompts, evaluation]
Reader = Callable[[Path], list[str]]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("end", PACKED)
@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("reader", READERS)
def test_every_task_reads_json_lines_alike(
    reader: Reader, mark: bytes, end: str, tmp_path: Path
) -> None:
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    file = tmp_path / f"a.jsonl{end}"
    file.write_bytes(PACKED[end](mark + text.encode()))
    assert reader(file) == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("end", PACKED)
@pytest.mark.parametrize("reader", READERS)
def test_the_line_of_broken_json_is_right(reader: Reader, end: str, tmp_path: Path) -> None:
    good = json.dumps(ROWS[0], ensure_ascii=False)
    file = tmp_path / f"a.jsonl{end}"
    file.write_bytes(PACKED[end](MARK + f'{good}\r\n\n \n{good}\n{{"text": \n{good}'.encode()))
    with pytest.raises(UserError, match=rf"a\.jsonl{end}:5: not JSON"):
        reader(file)


@pytest.mark.parametrize("reader", READERS)
def test_the_line_and_the_byte_of_bad_utf8_are_right(reader: Reader, tmp_path: Path) -> None:
    good = json.dumps(ROWS[0], ensure_ascii=False).encode() + b"\n"
    file = tmp_path / "a.jsonl"
    file.write_bytes(MARK + good * 2 + b'{"text": "\xff"}\n')
    byte = len(MARK) + 2 * len(good) + 10
    with pytest.raises(UserError, match=rf"a\.jsonl:3: byte {byte} is 0xff, which is not UTF-8"):
        reader(file)


DAMAGED = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "overwritten": lambda data: data[:12] + b"\xff" * 500 + data[512:],
    "not compressed": lambda _: b"{}\n" * 100,
    "with something behind": lambda data: data + b"hello",
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("end", [".gz", ".zst"])
@pytest.mark.parametrize("reader", READERS)
def test_damaged_compression_is_one_line_with_file_and_position(
    reader: Reader, end: str, damage: str, tmp_path: Path
) -> None:
    rows = [{**ROWS[0], "prompt": str(n**9), "text": str(n**9)} for n in range(3000)]
    whole = PACKED[end]("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    file = tmp_path / f"a.jsonl{end}"
    file.write_bytes(DAMAGED[damage](whole))
    with pytest.raises(UserError, match=rf"a\.jsonl{end}:\d+: (damaged from here|not JSON|byte)"):
        reader(file)


def test_a_line_of_a_compressed_file_is_found_again_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n')
    for name, texts in (("b.jsonl.gz", "bc"), ("c.jsonl.zst", "def")):
        data = MARK + "\n".join(json.dumps({"text": text}) for text in texts).encode()
        (tmp_path / name).write_bytes(PACKED[Path(name).suffix](data))
    (tmp_path / "d.jsonl").write_text('{"text": "g"}\n{"text": "h"}\n')
    (tmp_path / "e.jsonl").write_text('{"text": "i"}\n')
    documents = open_documents(SourceConfig(kind="jsonl", path=f"{tmp_path}/*"))
    assert [documents[n] for n in range(9)] == ["plain", *"bcdefghi"]
    assert documents.blocks == [1, 2, 3, 3]


def test_a_compressed_file_that_is_too_large_to_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_BYTES", 100)
    monkeypatch.setattr(lines, "MAX_BYTES", 100)
    data = b'{"text": "x"}\n' * 50
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(gzip.compress(data) if ".gz" in name else data)
    assert len(pretraining(tmp_path / "a.jsonl")) == 50
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: has 700 bytes once decompressed"):
        pretraining(tmp_path / "a.jsonl.gz")
    with pytest.raises(UserError, match=r"a\.json\.gz: has more than 100 bytes"):
        evaluation(tmp_path / "a.json.gz")


def test_a_line_that_is_too_long_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x"}\n' + "y" * 101)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the line has more than 100 bytes"):
        evaluation(file)


@pytest.mark.parametrize("reader", READERS)
def test_zstd_without_pyarrow_says_what_is_missing(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b"{}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: reading \.zst needs pyarrow; pip"):
        reader(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("end", PACKED)
def test_text_documents_json_and_csv_are_read_the_same(end: str, tmp_path: Path) -> None:
    for name, text in (("a.txt", ODD), ("a.json", json.dumps(ROWS)), ("a.csv", "prompt\nx\n")):
        (tmp_path / f"{name}{end}").write_bytes(PACKED[end](MARK + text.encode()))
    assert list(open_documents(SourceConfig(path=f"{tmp_path}/a.txt{end}"))) == [ODD]
    assert evaluation(tmp_path / f"a.json{end}") == [row["prompt"] for row in ROWS]
    assert next(read_rows(tmp_path / f"a.csv{end}"))[1] == {"prompt": "x", "file": "a"}


def test_a_row_of_csv_stands_where_it_begins(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerows([["prompt", "answer"], ["two\nlines", "1"], [ODD, "2"]])
    file.write_bytes(MARK + written.getvalue().encode().replace(b"two", b"\r\n\r\n") + b"\r\n")
    file.write_bytes(MARK + f"{written.getvalue()}\r\n\r\nlast,3\r\n".encode())
    found = [(where.removeprefix(str(file)), row["prompt"]) for where, row in read_rows(file)]
    assert found == [(":2", "two\nlines"), (":4", ODD), (":7", "last")]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b'prompt,answer\nx,1\n"y', r"a\.csv:3: is not CSV: unexpected end"),
        ("a.csv", b"prompt,answer\nx,1\n\ny\n", r"a\.csv:4: 1 cells; expected 2"),
        ("a.csv", b"prompt,answer\nx,1,2\n", r"a\.csv:2: 3 cells; expected 2"),
        ("a.csv", b"prompt\nx\n\xe9\n", r"a\.csv:3: byte 9 is 0xe9, which is not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json: byte 18 is 0xff"),
        ("a.json", b'[{"a": 1},\n{"a": ]', r"a\.json: is not JSON: .*line 2 column 7"),
        ("a.json", b"[" * 100_000, r"a\.json: is not JSON: "),
        ("a.json.gz", gzip.compress(b"[]")[:-9], r"a\.json\.gz: byte \d+: damaged from here on"),
    ],
)
def test_damaged_tables_are_one_line_with_file_and_position(
    name: str, data: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        evaluation(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def write_table(folder: Path, columns: dict[str, Any], rows: int | None = None) -> Path:
    """A file with checksums, in row groups of so many rows."""
    file = folder / "a.parquet"
    table = pyarrow.table(columns)
    parquet.write_table(table, file, row_group_size=rows, write_page_checksum=True)
    return file


def pretraining_parquet(path: Path) -> list[str]:
    return list(open_documents(SourceConfig(kind="parquet", path=str(path))))


PARQUET_READERS = [pretraining_parquet, tuning, prompts, evaluation]


@pytest.mark.parametrize("reader", PARQUET_READERS)
def test_a_damaged_page_is_named_by_its_row_group(reader: Reader, tmp_path: Path) -> None:
    texts = [f"{n**9}" for n in range(3000)]
    names = ("text", "prompt", "completion")
    file = write_table(tmp_path, dict.fromkeys(names, pyarrow.array(texts)), rows=1000)
    assert reader(file) == texts
    with parquet.ParquetFile(file) as opened:
        group = opened.metadata.row_group(1)
        starts = [group.column(n).data_page_offset for n in range(3)]
    damaged = bytearray(file.read_bytes())
    for start in starts:  # within the page, behind its header: where a checksum finds it
        damaged[start + 200] ^= 0xFF
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet: row group 1: cannot be read as parquet: "):
        reader(file)
    file.write_bytes(damaged[:-1000])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet: "):
        reader(file)


@pytest.mark.parametrize("reader", PARQUET_READERS)
def test_parquet_with_bad_utf8_is_one_line(reader: Reader, tmp_path: Path) -> None:
    bad = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    file = write_table(tmp_path, dict.fromkeys(("text", "prompt", "completion"), bad))
    with pytest.raises(UserError, match=r"a\.parquet: row (1|group 0).* 0xff"):
        reader(file)


def damage(data: bytes, draw: random.Random) -> bytes:
    """Cut, overwrite, remove or insert something somewhere."""
    begin, size = draw.randrange(len(data)), draw.randrange(1, 300)
    inserted = draw.choice([b"", b"\0" * 50, MARK, b"\r", b'"', draw.randbytes(size)])
    return data[:begin] + inserted + data[begin + draw.choice([0, size, len(data)]) :]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.csv",
                                  "a.parquet"])  # fmt: skip
def test_whatever_is_damaged_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    rows = [{key: f"{value} {n**9}" for key, value in ROWS[0].items()} for n in range(100)]
    lined = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if name == "a.parquet":
        columns = {key: [row[key] for row in rows] for key in ROWS[0]}
        whole = write_table(tmp_path, columns, rows=40).read_bytes()
    elif name == "a.csv":
        whole = "\n".join(f'"{row["prompt"]}",{row["answer"]}' for row in rows).encode()
    else:
        whole = json.dumps(rows).encode() if name == "a.json" else lined
    whole = PACKED.get(Path(name).suffix, bytes)(whole)
    file, draw, refused = tmp_path / name, random.Random(0), 0
    readers: list[Any] = [lambda path: list(read_rows(path))]
    readers += [pretraining_parquet] if name == "a.parquet" else []
    readers += [pretraining] if ".jsonl" in name else []
    for _ in range(100):
        file.write_bytes(damage(whole, draw))
        for reader in readers:
            try:
                reader(file)
            except UserError as error:
                assert str(file) in str(error) and len(str(error).splitlines()) == 1
                refused += 1
    assert refused > 20


STRINGS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    "dictionary of large": pyarrow.dictionary(pyarrow.int16(), pyarrow.large_string()),
}


def of_type(values: list[str], kind: Any) -> Any:
    if pyarrow.types.is_dictionary(kind):
        return pyarrow.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pyarrow.array(values, kind)


@pytest.mark.parametrize("name", STRINGS)
@pytest.mark.parametrize("reader", PARQUET_READERS)
def test_strings_are_read_in_every_type_of_arrow(reader: Reader, name: str, tmp_path: Path) -> None:
    strings = of_type(["one", "two", "three"], STRINGS[name])
    file = write_table(tmp_path, dict.fromkeys(("text", "prompt", "completion"), strings))
    assert reader(file) == ["one", "two", "three"]


@pytest.mark.parametrize("lists", [pyarrow.ListArray, pyarrow.LargeListArray])
@pytest.mark.parametrize("name", STRINGS)
def test_messages_are_read_in_every_type_of_arrow(name: str, lists: Any, tmp_path: Path) -> None:
    roles, contents = ["user", "assistant"], ["one", "two"]
    columns = [of_type(values, STRINGS[name]) for values in (roles, contents)]
    messages = pyarrow.StructArray.from_arrays(columns, ["role", "content"])
    size = pyarrow.int32() if lists is pyarrow.ListArray else pyarrow.int64()
    offsets = pyarrow.array([0, 2], size)
    file = write_table(tmp_path, {"messages": lists.from_arrays(offsets, messages)})
    found = [[m["content"] for m in one.messages] for one in read_conversations([str(file)])]
    assert found == [["one", "two"]]


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(2), pyarrow.null()]
)
@pytest.mark.parametrize("reader", PARQUET_READERS)
def test_what_is_no_string_is_refused_by_the_columns_name(
    reader: Reader, kind: Any, tmp_path: Path
) -> None:
    values = [None, None] if pyarrow.types.is_null(kind) else [b"ab", b"cd"]
    array = pyarrow.array(values, kind)
    file = write_table(tmp_path, dict.fromkeys(("text", "prompt", "completion"), array))
    name = "text" if reader is pretraining_parquet else "prompt"
    with pytest.raises(UserError, match=rf"a\.parquet.*({name}|keys are none)|column prompt"):
        reader(file)


def test_a_damaged_record_of_an_array_record_is_one_line(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    file = tmp_path / "a.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for number in range(200):
        writer.write(f"{number**9}".encode() * 50)
    writer.close()
    data = file.read_bytes()
    source = SourceConfig(kind="array_record", path=str(file))
    file.write_bytes(data[:80] + b"\xff" * 40 + data[120:])
    with pytest.raises(UserError, match=r"a\.array_record: record 0 is damaged: "):
        open_corpus(DataConfig(sources=[source], sequence_length=8))
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a\.array_record: cannot be read as ArrayRecord: \w"):
        open_documents(source)


@pytest.mark.parametrize("name", ["data[1].jsonl", "[old]/data.jsonl", "[a]/[b]*.jsonl"])
def test_brackets_are_part_of_a_name_that_exists(name: str, tmp_path: Path) -> None:
    file = tmp_path / name.replace("*", "1")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(ROWS[0]))
    if "*" in name:  # only the folder is there by its own name
        file.rename(file.with_name("b1.jsonl"))
    (tmp_path / "data1.jsonl").write_text("another file, which the pattern would match")
    for reader in READERS[:3]:
        assert reader(tmp_path / name) == [ROWS[0]["prompt"]]


def test_brackets_are_a_pattern_where_no_such_file_exists(tmp_path: Path) -> None:
    for name in ("data1.jsonl", "data2.jsonl", "data3.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    found = [file.name for file in find_files(f"{tmp_path}/data[12].jsonl", "data.sources")]
    assert found == ["data1.jsonl", "data2.jsonl"]
