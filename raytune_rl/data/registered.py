"""Data sets whose rows need a word more than they hold, as ms-swift prepares them.

A data set is known by its id on a hub, or by lying in a folder of that name (`AI-ModelScope/LaTeX_OCR`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from raytune_rl.data.columns import columns_of
from raytune_rl.data.example import BadRow, Row
from raytune_rl.data.specs import DatasetSpec

_OCR = "Using LaTeX to perform OCR on the image."

#: Id to the question that each of its rows is an answer to.
QUESTIONS: Mapping[str, str] = {"AI-ModelScope/LaTeX_OCR": _OCR, "linxy/LaTeX_OCR": _OCR}

#: Parts of a row that ask something by themselves.
_ASKING = ("query", "messages")


def question_of(spec: DatasetSpec, columns: Mapping[str, str], announce: Callable[[str], None]) -> str | None:
    """The question of a data set's rows, announced; None if it has none, or if `--columns` names a query."""
    name = spec.hub_id or "/".join(spec.path.absolute().parts[-2:] if spec.path else ())
    question = QUESTIONS.get(name)
    if question is None or any(target.lower() in _ASKING for target in columns.values()):
        return None
    announce(f"{spec.text}: every row is asked {question!r}, as in ms-swift")
    return question


def asked(row: Row | BadRow, question: str | None) -> Row | BadRow:
    """The row with the question as its query; unchanged if there is none or the row asks by itself."""
    if question is None or isinstance(row, BadRow) or any(columns_of(part, row.fields) for part in _ASKING):
        return row
    return replace(row, fields={**row.fields, "query": question})
