"""Compressed files: read as what they hold, in flat memory, and named when they are damaged."""

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys

import pyarrow as pa
import pytest

from raytune_rl.data.sources import parse_spec, read_rows
from raytune_rl.errors import DataError

ROWS = [{"query": f"q{i}", "response": "今" * i} for i in range(5)]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}


def lines():
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def table(delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["query", "response"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


TEXTS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda: json.dumps(ROWS, indent=1),
    ".csv": lambda: table(","),
    ".tsv": lambda: table("\t"),
}


def rows_of(path):
    return [row.fields for row in read_rows(parse_spec(str(path)))]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packed", ["", *PACK])
def test_a_text_is_read_however_it_is_compressed(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed.upper()}"
    data = TEXTS[kind]().encode()
    path.write_bytes(PACK[packed](data) if packed else data)
    assert rows_of(path) == ROWS


def test_json_lines_named_json_and_lines_of_text(tmp_path):
    (tmp_path / "a.json.zst").write_bytes(PACK[".zst"](lines().encode()))
    assert rows_of(tmp_path / "a.json.zst") == ROWS
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    assert rows_of(tmp_path / "a.txt.gz") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("packed", PACK)
def test_parts_that_were_put_together_are_read_to_the_end(tmp_path, packed):
    """`cat a.gz b.gz > c.gz` is a whole file."""
    first, *rest = lines().splitlines(keepends=True)
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACK[packed](first.encode()) + PACK[packed]("".join(rest).encode()))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz"])
def test_a_file_compressed_under_a_plain_name_is_read(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(PACK[packed](lines().encode()))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_cut_off_is_named(tmp_path, packed, kind):
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](TEXTS[kind]().encode())[:-6])
    with pytest.raises(DataError, match=rf"a{kind}\{packed}: a damaged or cut-off compressed file"):
        rows_of(path)


@pytest.mark.parametrize("packed", PACK)
def test_a_file_with_wrong_bytes_is_named(tmp_path, packed):
    path = tmp_path / f"a.jsonl{packed}"
    data = bytearray(PACK[packed](lines().encode()))
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    path.write_bytes(data)
    if packed != ".zst":  # pyarrow writes no check sum: what is wrong is then the row
        with pytest.raises(DataError, match=rf"a\.jsonl\{packed}: a damaged or cut-off compressed file"):
            rows_of(path)
    path.write_text(lines())
    with pytest.raises(DataError, match=rf"a\.jsonl\{packed}: it is no \{packed} file"):
        rows_of(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"a\.jsonl\{packed}: it is empty"):
        rows_of(path)


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.tar.gz", "a.gz", "a.zip"])
def test_what_cannot_be_read_is_named_with_what_can(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read \S+; known: \.jsonl .*\.csv .*\(each also with \.gz"):
        rows_of(tmp_path / name)
    with pytest.raises(DataError, match="no file or folder"):
        parse_spec("owner/name.jsonl.gz")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path, packed):
    """256 MiB of rows in a process that may not have so much more than it has after its imports."""
    path = tmp_path / f"a.jsonl{packed}"
    block = (json.dumps({"query": "q" * 1000, "response": "a" * 1000}) + "\n").encode() * 512
    with path.open("wb") as file:
        for _ in range(256):
            file.write(PACK[packed](block))
    code = (
        "import resource, sys, pyarrow; from raytune_rl.data.sources import parse_spec, read_rows; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak(); "
        f"n = sum(1 for _ in read_rows(parse_spec({str(path)!r}))); print(n, (peak() - before) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, grown_mib = map(int, run.stdout.split())
    assert rows == 256 * 512
    assert grown_mib < 64
