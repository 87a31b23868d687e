"""Rules of one row: what a data set's rows need before they are read, and who the model says that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Fields = dict[str, Any]


#: What stands in rows for the model's name and for its author.
PLACEHOLDERS = ("{{NAME}}", "{{AUTHOR}}")


@dataclass(frozen=True)
class Identity:
    """Who the model is to say that it is: values for Chinese and for English rows, or one for both."""

    name: tuple[str, ...] = ()
    author: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """The context of a row for a rule: its number in its source, and the identity."""

    line: int
    identity: Identity


@dataclass(frozen=True)
class Rule:
    """The preparation of a data set's rows.

    Attributes:
        says: What it does, for the user: "the prefix ... is taken off".
        needs: Columns (whatever their case) without which a row is left as it is.
        make: The new row, in columns with the names of parts; None leaves the row out.
        leaves_out: Which rows are left out, in words.
        identity: Whether it puts the model's name and author in the place of `PLACEHOLDERS`.
    """

    says: str
    needs: tuple[str, ...]
    make: Callable[[Fields, Context], Fields | None]
    leaves_out: str = ""
    identity: bool = False

    def fits(self, fields: Mapping[str, Any]) -> bool:
        present = {name.lower() for name in fields}
        return all(name.lower() in present for name in self.needs)


def without(fields: Fields, *names: str) -> Fields:
    """The row without some columns, whatever their case."""
    lowered = {name.lower() for name in names}
    return {name: value for name, value in fields.items() if name.lower() not in lowered}


def value(fields: Fields, name: str) -> Any:
    """A column's value, whatever the case of its name."""
    return next((found for key, found in fields.items() if key.lower() == name.lower()), None)


def renamed(columns: Mapping[str, str]) -> Rule:
    """Columns under the names of the parts that they play, all at once; "" leaves a column out."""

    def make(fields: Fields, _: Context) -> Fields:
        lowered = {source.lower(): target for source, target in columns.items()}
        kept = {n: v for n, v in fields.items() if n.lower() not in lowered and n not in columns.values()}
        new = {lowered[n.lower()]: v for n, v in fields.items() if lowered.get(n.lower())}
        return {**kept, **new}

    description = ", ".join(
        f"{old!r} is the {new}" if new else f"{old!r} is not read" for old, new in columns.items()
    )
    return Rule(description, tuple(source for source, target in columns.items() if target), make)


def asked(question: str, answer: str | None = None, images: str | None = None) -> Rule:
    """Every row is an answer to the same question."""

    def make(fields: Fields, context: Context) -> Fields | None:
        if any(value(fields, part) is not None for part in ("query", "messages")):
            return fields
        moved = {old: new for old, new in ((answer, "response"), (images, "images")) if old}
        row = renamed(moved).make(fields, context) or {}
        return {**row, "query": question}

    return Rule(f"every row is asked {question!r}", tuple(name for name in (answer, images) if name), make)


def filled(says: str, needs: tuple[str, ...], query: str, response: str | None = None) -> Rule:
    """Query and response from patterns with the names of columns."""

    def make(fields: Fields, _: Context) -> Fields:
        texts = {name: value(fields, name) for name in needs}
        row = {**without(fields, *needs), "query": query.format(**texts)}
        return row if response is None else {**row, "response": response.format(**texts)}

    return Rule(says, needs, make)
