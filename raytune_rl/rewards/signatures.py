"""How a reward function wants to be called, read from the names of its parameters.

    ms-swift  f(completions, solution, **kwargs): one list a column, the first by position
    TRL       f(prompts, completions, completion_ids, **kwargs): the same, everything by name
    verl      compute_score(data_source, solution_str, ground_truth, extra_info=None): one completion a call;
              with the plurals of these names a batch a call; a number, or a dict with "score"

Sources: the reward sections of the three projects' documentation.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Unscored

_TRL = ("prompts", "completion_ids", "trainer_state")
_TRL_ONLY = ("log_extra", "log_metric", "environments")
_VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
_GOLD = "ground_truth or solution or reward_model"


@dataclass(frozen=True)
class Signature:
    """How a function is called.

    Attributes:
        call: `call(completions, columns)` -> what it returns; a coroutine if `is_async`.
        required: Columns without which it cannot be called; "a or b" is one of them.
        is_async: Whether `call` returns a coroutine.
    """

    call: Callable[[list[str], dict[str, Any]], Any]
    required: tuple[str, ...]
    is_async: bool


class Completion(str):
    """A completion that can also be read as TRL gives it for conversations: `c[0]["content"]` is the text."""

    __slots__ = ()

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, int) and key in (0, -1):
            return _Turn(super().__getitem__(slice(key, key + 1 or None)), self)
        return super().__getitem__(key)


class _Turn(str):
    """The first or last character of a completion, and the assistant's turn that it is all of."""

    _text: str

    def __new__(cls, character: str, text: str) -> _Turn:
        turn = super().__new__(cls, character)
        turn._text = str(text)
        return turn

    def __getitem__(self, key: Any) -> str:
        return self.get(key) if key in ("content", "role") else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return {"content": self._text, "role": "assistant"}.get(key, default)


def read_signature(name: str, function: Callable[..., Any]) -> Signature:
    """Finds out how a function is to be called.

    Raises:
        RewardError: Its parameters cannot be read or filled.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError) as error:
        raise RewardError(f"Reward `{name}`: its parameters cannot be read: {error}") from error
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in named]
    if unknown := [p.name for p in named if p.name in _TRL_ONLY and p.default is p.empty]:
        raise RewardError(
            f"Reward `{name}` takes `{unknown[0]}`, which TRL gives and raytune_rl does not have; give the "
            "parameter a default such as None."
        )
    for plural in ("", "s"):
        if {f"solution_str{plural}", f"ground_truth{plural}"} <= set(names):
            return _verl(function, named, plural, is_async)
    first = next((p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if first is None and "completions" not in names and not open_ended and not starred:
        raise RewardError(f"Reward `{name}` takes no completions: write f(completions, **kwargs).")
    takes_by_name = "completions" in names or (open_ended and (first is None or first.name in _TRL))
    by_name = takes_by_name and (first is None or first.name != "completions")
    rest = [p for p in named if p.name != "completions" and (by_name or p is not first)]
    accepted = None if open_ended else {p.name for p in rest}
    taken = {"completions"} if by_name or first is None else {first.name}

    def call(completions: list[str], columns: dict[str, Any]) -> Any:
        # A slice is a plain list: taking it shows no progress yet.
        readable = type(completions)([Completion(text) for text in completions[:]])
        given = {column: value for column, value in with_trl_names(columns).items() if column not in taken}
        if accepted is not None:
            given = {column: value for column, value in given.items() if column in accepted}
        return function(completions=readable, **given) if by_name else function(readable, **given)

    supplied = {"prompts": "messages", "completion_ids": "response_token_ids"}
    required = [p.name for p in rest if p.default is p.empty]
    return Signature(call, tuple(f"{c} or {supplied[c]}" if c in supplied else c for c in required), is_async)


def with_trl_names(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns, and under TRL's names the conversations without the completion and the sampled tokens."""
    named = {}
    if "messages" in columns:
        named["prompts"] = [(turns or [])[:-1] for turns in columns["messages"]]
    if "response_token_ids" in columns:
        named["completion_ids"] = columns["response_token_ids"]
    return {**named, **columns}


def _verl(
    function: Callable[..., Any], named: Sequence[inspect.Parameter], plural: str, is_async: bool
) -> Signature:
    own = [p for p in named if p.name not in {f"{name}{plural}" for name in _VERL}]
    takes = {p.name for p in named}

    def arguments(texts: Sequence[str], columns: dict[str, Any]) -> dict[str, Sequence[Any]]:
        count = len(texts)
        given = {
            f"data_source{plural}": columns.get("data_source") or [""] * count,
            f"solution_str{plural}": texts,
            f"ground_truth{plural}": _golds(columns),
            f"extra_info{plural}": [info or {} for info in columns.get("extra_info") or [None] * count],
            **{p.name: columns[p.name] for p in own if p.name in columns},
        }
        return {name: column for name, column in given.items() if name in takes}

    def batch(completions: list[str], columns: dict[str, Any]) -> Any:
        return function(**arguments(completions, columns))

    async def batch_async(completions: list[str], columns: dict[str, Any]) -> Any:
        return _scores(await batch(completions, columns))

    def each(completions: list[str], columns: dict[str, Any]) -> list[Any]:
        given = arguments(completions, columns)
        return [function(**dict(zip(given, row, strict=True))) for row in zip(*given.values(), strict=True)]

    async def each_async(completions: list[str], columns: dict[str, Any]) -> Any:
        return _scores(await asyncio.gather(*each(completions, columns)))

    required = (_GOLD, *(p.name for p in own if p.default is p.empty))
    if is_async:
        return Signature(batch_async if plural else each_async, required, True)
    once = batch if plural else each
    return Signature(lambda completions, columns: _scores(once(completions, columns)), required, False)


def _golds(columns: dict[str, Any]) -> list[Any]:
    for name in ("ground_truth", "solution"):
        if name in columns:
            return list(columns[name])
    return [(row or {}).get("ground_truth") for row in columns["reward_model"]]


def _scores(found: Any) -> Any:
    return [_score(one) for one in found] if isinstance(found, (list, tuple)) else found


def _score(one: Any) -> Any:
    if not isinstance(one, dict):
        return one
    return one["score"] if "score" in one else Unscored(f"returned a dict without 'score': {sorted(one)}")
