"""Reading and encoding more rows takes more disk, not more memory: a few numbers stay of each row."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

from raytune_rl.data.encode import encode_sft
from raytune_rl.data.load import load_examples

BYTES_A_ROW = 200
"""Some eight numbers of eight bytes, twice while an array grows. A row as Python objects takes about 3 KB."""


def peak_of(rows: int, path: Path, tokenizer: Any) -> int:
    data, columns = path / f"{rows}.json", path / str(rows)
    columns.mkdir()
    chats = [{"query": f"What is {n}?", "response": "The answer is 42. " * 5} for n in range(rows)]
    data.write_text(json.dumps(chats))
    del chats
    tracemalloc.start()
    try:
        loaded = load_examples([str(data)], task="sft")
        assert len(encode_sft(loaded.examples, tokenizer, folder=columns).tokens) == rows
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, chatml: Any) -> None:
    peak_of(8, tmp_path, chatml)  # what is made once
    few, many = 1024, 3072
    grown = peak_of(many, tmp_path, chatml) - peak_of(few, tmp_path, chatml)
    assert grown < BYTES_A_ROW * (many - few)
