"""Readers of one file each, by suffix. They stream, and say where every row and every broken place is."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytune_rl.data.example import BadRow, Row
from raytune_rl.errors import DataError

Reader = Callable[[Path], Iterator[Row | BadRow]]

_SPACE = re.compile(r"\s*")
_ARROW_FILE_MAGIC = b"ARROW1"
_TABLE_ROWS = 1024


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """The rows of one file, in order.

    Raises:
        DataError: The suffix is not one of `READERS`, or the file cannot be read at all.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; known: {' '.join(READERS)}"
        )
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    """One JSON object a line; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield _json_line(path, number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)


def _json_line(path: Path, number: int, raw: bytes) -> Row | BadRow:
    shown = raw.decode("utf-8", "replace").rstrip("\r\n")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(str(path), number, f"not UTF-8: {error.reason} at byte {error.start}", shown)
    except json.JSONDecodeError as error:
        return BadRow(str(path), number, f"broken JSON: {error.msg} at column {error.colno}", shown)
    return _as_row(path, number, value, shown)


def _as_row(path: Path, line: int, value: Any, raw: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(str(path), line, f"a row must be a JSON object, this is {_kind(value)}", raw)
    return Row(value, str(path), line)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def read_json(path: Path) -> Iterator[Row | BadRow]:
    """A list of objects, one object, or objects one after the other (JSON Lines under the name .json)."""
    if _is_json_lines(path):
        yield from read_jsonl(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRow(str(path), 1, f"not UTF-8: {error.reason} at byte {error.start}", "")
        return
    yield from _json_values(path, text)


def _is_json_lines(path: Path) -> bool:
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _json_values(path: Path, text: str) -> Iterator[Row | BadRow]:
    """Decodes element by element, because the line of each element is wanted."""
    decoder = json.JSONDecoder()
    at = _skip(text, 0)
    in_list = text[at : at + 1] == "["
    if in_list:
        at = _skip(text, at + 1)
    line, counted = 1, 0
    while at < len(text) and not (in_list and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            reason = f"broken JSON: {error.msg} at column {error.colno}; nothing after it can be read"
            yield BadRow(str(path), error.lineno, reason, text[at : at + 200])
            return
        yield _as_row(path, line, value, text[at : min(end, at + 2000)])
        at = _skip(text, end)
        if in_list and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif in_list and text[at : at + 1] != "]":
            broken = line + text.count("\n", counted, at)
            yield BadRow(
                str(path), broken, "broken JSON: the list needs a comma or its end here", text[at : at + 200]
            )
            return
    if in_list and at >= len(text):
        yield BadRow(str(path), 1 + text.count("\n"), "broken JSON: the list is never closed", "")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """A header and records; quoted fields may span lines. All values are strings, an empty field is ''."""
    # The module's own limit of 128 KiB a field is less than a long conversation.
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as text:
        records = csv.reader(text, delimiter=delimiter)
        try:
            header = next(records, [])
            if len(set(header)) != len(header):
                yield BadRow(str(path), 1, f"the header names a column twice: {', '.join(header)}", "")
                return
            line = records.line_num + 1
            for record in records:
                if record:
                    yield _csv_row(path, line, header, record)
                line = records.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            yield BadRow(
                str(path), records.line_num + 1, f"broken CSV: {error}; nothing after it can be read", ""
            )


def _csv_row(path: Path, line: int, header: list[str], record: list[str]) -> Row | BadRow:
    if len(record) != len(header):
        reason = f"{len(record)} fields, but the header has {len(header)}"
        return BadRow(str(path), line, reason, json.dumps(record, ensure_ascii=False))
    return Row(dict(zip(header, record, strict=True)), str(path), line)


def read_txt(path: Path) -> Iterator[Row | BadRow]:
    """One text a line, in the column `text`; blank lines are skipped."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                shown = raw.decode("utf-8", "replace")
                yield BadRow(str(path), number, f"not UTF-8: {error.reason} at byte {error.start}", shown)
                continue
            if text.strip():
                yield Row({"text": text}, str(path), number)


def read_parquet(path: Path) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file; images stay encoded. `line` is the row's number, from 1."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=_TABLE_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, str(path), number)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Rows of an Arrow file, memory-mapped, in the stream format (`datasets`) or the file format
    (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            number = 0
            for batch in _arrow_batches(path, source):
                for start in range(0, batch.num_rows, _TABLE_ROWS):
                    for fields in batch.slice(start, _TABLE_ROWS).to_pylist():
                        number += 1
                        yield Row(fields, str(path), number)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error


def _arrow_batches(path: Path, source: Any) -> Iterator[Any]:
    import pyarrow as pa

    with path.open("rb") as head:
        is_file_format = head.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    if is_file_format:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from pa.ipc.open_stream(source)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
