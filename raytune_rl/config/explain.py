"""pydantic's findings, said to the person who typed the flags."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from raytune_rl.config.flags import Flag

_NOT_A = {
    "int_parsing": "is not a whole number",
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "string_type": "is not text",
    "dict_type": "is not a mapping (JSON object)",
    "tuple_type": "is not a list of values",
}
_BOUND = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


def nearest(name: str, names: Iterable[str], how_many: int = 3) -> list[str]:
    """The names that are likely meant by a misspelt one, best first."""
    return difflib.get_close_matches(name, list(names), n=how_many, cutoff=0.6)


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """` Did you mean --a or --b?`, or an empty string where nothing is near."""
    flags = [prefix + near for near in nearest(name, names)]
    return f" Did you mean {' or '.join(flags)}?" if flags else ""


def explain(error: ValidationError, flags: Mapping[str, Flag]) -> str:
    """One line per flag at fault: its name, the value given, and what is allowed. Secrets are never shown."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        # A union reports each alternative that failed; the first stands for all of them.
        lines.setdefault(name, _line(name, dict(problem), flags))
    return "\n".join(lines.values())


def _line(name: str, problem: dict[str, Any], flags: Mapping[str, Flag]) -> str:
    error_type = problem["type"]
    if error_type == "extra_forbidden":
        return f"Unknown setting {name!r}.{did_you_mean(name, flags)}"
    if error_type == "missing":
        return f"--{name} is required."
    flag = flags.get(name)
    value = "the value given" if flag is not None and flag.secret else repr(problem.get("input"))
    item = next((f"value {part + 1}, " for part in problem["loc"][1:] if isinstance(part, int)), "")
    if error_type == "literal_error" and flag is not None:
        allowed = ", ".join(flag.choices)
        near = did_you_mean(str(problem.get("input")), flag.choices)
        return f"--{name}: {item}{value} is not one of: {allowed}.{near}"
    if error_type in _BOUND:
        words, key = _BOUND[error_type]
        return f"--{name}: {item}{value} {words} {problem['ctx'][key]}."
    reason = _NOT_A.get(error_type, f"cannot be used: {problem['msg']}")
    return f"--{name}: {item}{value} {reason}."
