"""Small corpora, written in every format."""

import json
import random
from pathlib import Path


def make_texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Distinct documents of very different lengths, with line ends and characters of all widths."""
    draw = random.Random(seed)
    alphabet = "abcdefgh    \n\r\t(){}=._0123456789äß中文字😀"
    return [
        f"{seed}-{number} " + "".join(draw.choices(alphabet, k=draw.randrange(longest)))
        for number in range(count)
    ]


def write_text(folder: Path, texts: list[str]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    return f"{folder}/*.txt"


def write_jsonl(folder: Path, texts: list[str]) -> str:
    """Two files; a blank line before each document."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip("ab", _halves(texts), strict=True):
        lines = [
            f"\n{json.dumps({'id': 1, 'text': t}, ensure_ascii=i % 2 == 0)}\n"
            for i, t in enumerate(part)
        ]
        (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
    return f"{folder}/*.jsonl"


def write_parquet(folder: Path, texts: list[str], row_group_size: int = 3) -> str:
    """Two files of small row groups."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip("ab", _halves(texts), strict=True):
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=row_group_size)
    return f"{folder}/*.parquet"


def write_array_record(folder: Path, texts: list[str]) -> str:
    """Two files."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip("ab", _halves(texts), strict=True):
        writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
        for text in part:
            writer.write(text.encode())
        writer.close()
    return f"{folder}/*.array_record"


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "array_record": write_array_record,
}


def _halves(texts: list[str]) -> tuple[list[str], list[str]]:
    middle = len(texts) // 2 + 1
    return texts[:middle], texts[middle:]
