"""Readers of one file each, by suffix. They stream, and say where every row and every broken place is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from raytune_rl.data.compression import DAMAGE, MAGIC, CompressionError, opened, suffixes
from raytune_rl.data.example import BadRow, Row
from raytune_rl.data.json_text import DECODER, JsonText, RepeatedKeyError
from raytune_rl.data.tables import TableRows
from raytune_rl.errors import DataError

Reader = Callable[[Path], Iterator[Row | BadRow]]

_ARROW_FILE_MAGIC = b"ARROW1"
_TABLE_ROWS = 128  # rows may hold pictures
_HEAD = 4096


def read_file(path: Path) -> Iterator[Row | BadRow]:
    """The rows of one file, in order.

    Raises:
        DataError: Its suffixes are not known, or it cannot be read, or not to its end.
    """
    if not is_data(path):
        what = "".join(suffixes(path)) or "a file without a suffix"
        raise DataError(f"{path}: cannot read {what}; known: {known()}")
    try:
        yield from READERS[suffixes(path)[0]](path)
    except CompressionError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, *DAMAGE) as error:
        damaged = suffixes(path)[1] and not getattr(error, "errno", None)
        what = "a damaged or cut-off compressed file" if damaged else "cannot be read"
        raise DataError(f"{path}: {what}: {getattr(error, 'strerror', None) or error}") from error


def is_data(path: Path) -> bool:
    """Whether a file of this name can be read. Tables are compressed inside, not as files."""
    suffix, compression = suffixes(path)
    return suffix in READERS and not (compression and READERS[suffix] in _TABLES)


def known() -> str:
    """The suffixes that can be read, in words."""
    texts = " ".join(suffix for suffix, reader in READERS.items() if reader not in _TABLES)
    tables = " ".join(suffix for suffix, reader in READERS.items() if reader in _TABLES)
    return f"{texts} (each also with {' '.join(MAGIC)}) {tables}"


def read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    """One JSON object a line; blank lines are skipped."""
    with opened(path) as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                yield _json_line(path, number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)


def _json_line(path: Path, number: int, raw: bytes) -> Row | BadRow:
    shown = raw.decode("utf-8", "replace").rstrip("\r\n")
    try:
        value = DECODER.decode(raw.decode("utf-8"))
    except RepeatedKeyError as error:
        return BadRow(str(path), number, str(error), shown)
    except UnicodeDecodeError as error:
        return BadRow(str(path), number, f"not UTF-8: {error.reason} at byte {error.start}", shown)
    except json.JSONDecodeError as error:
        return BadRow(str(path), number, f"broken JSON: {error.msg} at column {error.colno}", shown)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return BadRow(str(path), number, f"JSON beyond what can be read: {error}", shown[:2000])
    return _as_row(path, number, value, shown)


def _as_row(path: Path, line: int, value: Any, raw: str) -> Row | BadRow:
    if isinstance(value, RepeatedKeyError):
        return BadRow(str(path), line, str(value), raw)
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
        with TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
            text = JsonText(file)
            yield from _json_values(path, text)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 here or soon after: {error.reason}; nothing after it can be read"
        yield BadRow(str(path), text.line, reason, "")


def _is_json_lines(path: Path) -> bool:
    with opened(path) as lines:
        # A list may be one line of any length: its first character is enough to know it.
        head = lines.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head[:1] == b"[":
            return False
    with opened(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _json_values(path: Path, text: JsonText) -> Iterator[Row | BadRow]:
    """Decodes element by element: the line of each is wanted, and memory shall hold few of them."""
    in_list = text.peek() == "["
    if in_list:
        text.drop(1)
    while (next_one := text.peek()) and not (in_list and next_one == "]"):
        try:
            value, end = text.decode()
        except json.JSONDecodeError as error:
            reason = f"broken JSON: {error.msg} at column {error.colno}; nothing after it can be read"
            yield BadRow(str(path), text.line + error.lineno - 1, reason, text.ahead(200))
            return
        yield _as_row(path, text.line, value, text.ahead(min(end, 2000)))
        text.drop(end)
        following = text.peek()
        if in_list and following == ",":
            text.drop(1)
        elif in_list and following not in ("]", ""):
            reason = "broken JSON: the list needs a comma or its end here; nothing after it can be read"
            yield BadRow(str(path), text.line, reason, text.ahead(200))
            return
    if in_list and not text.peek():
        yield BadRow(str(path), text.line, "broken JSON: the list is never closed", "")


def read_csv(path: Path) -> Iterator[Row | BadRow]:
    """A header and records; quoted fields may span lines. All values are strings, an empty field is ''."""
    # The module's own limit of 128 KiB a field is less than a long conversation.
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if suffixes(path)[0] == ".tsv" else ","
    # A byte that is no UTF-8 is its record's fault alone, so it is looked for in each record.
    with TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
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
        except csv.Error as error:
            yield BadRow(
                str(path), records.line_num + 1, f"broken CSV: {error}; nothing after it can be read", ""
            )


def _csv_row(path: Path, line: int, header: list[str], record: list[str]) -> Row | BadRow:
    try:
        "".join((*header, *record)).encode()
    except UnicodeEncodeError:
        return BadRow(str(path), line, "not UTF-8", json.dumps(record))
    if len(record) != len(header):
        reason = f"{len(record)} fields, but the header has {len(header)}"
        return BadRow(str(path), line, reason, json.dumps(record, ensure_ascii=False))
    return Row(dict(zip(header, record, strict=True)), str(path), line)


def read_txt(path: Path) -> Iterator[Row | BadRow]:
    """One text a line, in the column `text`; blank lines are skipped."""
    with opened(path) as lines:
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
            rows = TableRows(table.schema_arrow, str(path))
            for batch in table.iter_batches(batch_size=_TABLE_ROWS):
                yield from rows.of(batch)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error


def read_arrow(path: Path) -> Iterator[Row | BadRow]:
    """Rows of an Arrow file, memory-mapped, in the stream format (`datasets`) or the file format
    (Feather)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            schema, batches = _arrow_batches(path, source)
            rows = TableRows(schema, str(path))
            for batch in batches:
                for start in range(0, batch.num_rows, _TABLE_ROWS):
                    yield from rows.of(batch.slice(start, _TABLE_ROWS))
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error


def _arrow_batches(path: Path, source: Any) -> tuple[Any, Iterator[Any]]:
    """The schema and the record batches of an Arrow file."""
    import pyarrow as pa

    with path.open("rb") as head:
        is_file_format = head.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    if is_file_format:
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, iter(stream)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
_TABLES = (read_parquet, read_arrow)
