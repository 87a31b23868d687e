"""Rows of Arrow tables (Parquet, Arrow, `datasets`) as they were before they became a table.

A table changes rows in two ways. A column whose items differ in shape holds each as JSON text: `datasets`
names such columns by its feature `Json`, in the schema's metadata, and Arrow by a type of its own. And every
struct has every key of its column, null where the row had no such key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from raytune_rl.data.conversation import present
from raytune_rl.data.dialects import is_turns
from raytune_rl.data.example import Row

Change = Callable[[Any], Any]

#: Where a text that reads as JSON (`42`, `{"a": 1}`) is a text all the same. `datasets` writes a text into a
#: column of JSON as it stands if it is JSON by itself, so that nothing but the place tells them apart.
_TEXTS = {
    "content", "value", "text", "system", "query", "prompt", "question", "instruction", "input", "output",
    "response", "completion", "chosen", "rejected", "rejected_response",
}  # fmt: skip


class TableRows:
    """Rows of the batches of one table.

    Args:
        schema: The table's `pyarrow.Schema`, with its metadata.
        source: What the rows are to say they are from.
    """

    def __init__(self, schema: Any, source: str) -> None:
        features = _features(schema.metadata)
        self._source = source
        self._number = 0
        self._decode = _by_name({f.name: _decoder(f.type, features.get(f.name), f.name) for f in schema})
        self._present = _by_name({f.name: _presence(f.type, features.get(f.name)) for f in schema})

    def of(self, batch: Any) -> Iterator[Row]:
        """The rows of the next batch, numbered from 1 through all of them."""
        for fields in batch.to_pylist():
            for name, change in self._decode.items():
                if fields[name] is not None:
                    fields[name] = change(fields[name])
            self._number += 1
            yield Row(fields, self._source, self._number, self._present)


def _by_name(changes: Mapping[str, Change | None]) -> dict[str, Change]:
    return {name: change for name, change in changes.items() if change is not None}


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The features that `datasets` wrote beside a table, by column; empty without any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _children(arrow_type: Any, feature: Any) -> list[tuple[str, Any, Any]]:
    """Name, type and feature of each field of a struct."""
    named = feature if isinstance(feature, dict) and not isinstance(feature.get("_type"), str) else {}
    return [(field.name, field.type, named.get(field.name)) for field in arrow_type]


def _item(feature: Any) -> Any:
    if isinstance(feature, list):  # how features were written once
        return feature[0] if feature else None
    return feature.get("feature") if isinstance(feature, dict) else None


def _is_json(arrow_type: Any, feature: Any) -> bool:
    return getattr(arrow_type, "extension_name", None) == "arrow.json" or (
        isinstance(feature, dict) and feature.get("_type") == "Json"
    )


def _is_list(arrow_type: Any) -> bool:
    import pyarrow.types as types

    list_types = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(is_type(arrow_type) for is_type in list_types) or types.is_large_list_view(arrow_type)


def _decoder(arrow_type: Any, feature: Any, name: str) -> Change | None:
    """A function that makes a value of a type out of what `to_pylist` gives; None where they are the same."""
    import pyarrow.types as types

    if _is_json(arrow_type, feature):
        return _text_or_json if name.lower() in _TEXTS else _json
    if types.is_struct(arrow_type):
        inner = _by_name({key: _decoder(of, what, key) for key, of, what in _children(arrow_type, feature)})

        def struct(value: dict[str, Any]) -> dict[str, Any]:
            for key, change in inner.items():
                if value[key] is not None:
                    value[key] = change(value[key])
            return value

        return struct if inner else None
    if types.is_map(arrow_type):
        of_item = _decoder(arrow_type.item_type, None, "") or (lambda value: value)
        return lambda pairs: {key: None if item is None else of_item(item) for key, item in pairs}
    if _is_list(arrow_type):
        each = _decoder(arrow_type.value_type, _item(feature), name)
        return each and (lambda items: [None if item is None else each(item) for item in items])
    return None


def _presence(arrow_type: Any, feature: Any) -> Change | None:
    """A function that leaves out of a decoded value the keys that structs have no value for; None if it has
    no structs.

    A null inside of what was JSON text was written, and stays.
    """
    import pyarrow.types as types

    if _is_json(arrow_type, feature):
        return None
    if types.is_struct(arrow_type):
        inner = _by_name({key: _presence(of, what) for key, of, what in _children(arrow_type, feature)})

        def struct(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {key: inner[key](item) if key in inner else item for key, item in present(value).items()}

        return struct
    if types.is_map(arrow_type):
        of_item = _presence(arrow_type.item_type, None)
        return of_item and (
            lambda value: (
                {key: None if item is None else of_item(item) for key, item in value.items()}
                if isinstance(value, dict)
                else value
            )
        )
    if _is_list(arrow_type):
        each = _presence(arrow_type.value_type, _item(feature))
        return each and (
            lambda items: (
                [None if item is None else each(item) for item in items] if isinstance(items, list) else items
            )
        )
    return None


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _text_or_json(text: Any) -> Any:
    """The value where a text is expected: a text, null, turns, or parts of a content; of all else the JSON
    itself."""
    value = _json(text)
    items = [value] if isinstance(value, dict) else value
    if value is None or isinstance(value, str) or is_turns(value):
        return value
    parts = isinstance(items, list) and all(isinstance(item, dict) and "type" in item for item in items)
    return value if parts else text
