"""`raytune-rl reward-check`: what reward functions say of a data set's own solutions. No Ray, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytune_rl.algorithms.advantages import combine_rewards, known_rewards
from raytune_rl.config import RewardCheckConfig
from raytune_rl.data.example import Example, MediaRef
from raytune_rl.data.load import load_examples
from raytune_rl.data.media_tags import TAGS
from raytune_rl.data.rules import Identity
from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import Failure, TrainerState, failed_entries, with_completions
from raytune_rl.rewards.preflight import RewardNeeds
from raytune_rl.rewards.sandbox import Sandbox, memory_limit_bytes
from raytune_rl.tracking.text import number

CHUNK = 64
"""Completions a call, so that one slow sample does not use up the others' time."""

SOLUTION_COLUMNS = ("solution", "answer", "response", "output", "target")
"""Where a row's own solution may be, the first that it has."""


@dataclass(frozen=True)
class Tried:
    """One kind of completion, scored for every row.

    Attributes:
        kind: In words.
        values: float64 `[rows, functions]`, NaN where there is none.
        failures: With the number of the row.
        seconds: By function.
    """

    kind: str
    values: NDArray[np.float64]
    failures: tuple[Failure, ...]
    seconds: NDArray[np.float64]


def run(config: RewardCheckConfig, console: Console | None = None) -> tuple[Tried, ...]:
    """Scores every row's solution as it stands, the same in the R1 form, and an empty completion.

    Raises:
        RewardError: A function cannot be had, a column is missing, or a function failed on every completion.
        RaytuneError: The data cannot be read.
    """
    console = console or Console()
    byte_limit = memory_limit_bytes(config.reward_memory_limit)
    sandbox = Sandbox(
        config.reward_funcs,
        config.external_plugins,
        config.args(),
        config.reward_timeout,
        memory_limit_bytes=byte_limit,
    )
    try:
        loaded = load_examples(
            config.dataset,
            task="grpo",
            columns=config.columns,
            strict=config.strict,
            seed=config.data_seed,
            use_hf=config.use_hf,
            identity=Identity(config.model_name, config.model_author),
        )
        examples = loaded.examples[: config.rows or None]
        names = list(dict.fromkeys(name for example in examples for name in example.extra))
        media = [name for name in TAGS if any(getattr(example, name) for example in examples)]
        RewardNeeds(sandbox.names, sandbox.required).check([*names, "messages", *media])
        ids = _tokenizer(config)
        tried = tuple(
            _score(sandbox, kind, texts, examples, names, ids)
            for kind, texts in _completions(examples).items()
        )
    finally:
        sandbox.close()
    _show(console, config, sandbox, tried, examples, len(loaded.examples), loaded.report.bad)
    _refuse_useless(sandbox, tried)
    return tried


def _completions(examples: Sequence[Example]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    column = next((c for c in SOLUTION_COLUMNS if any(e.extra.get(c) for e in examples)), None)
    if column is not None:
        own = [str(example.extra.get(column) or "") for example in examples]
        kinds[f"its own `{column}`"] = own
        kinds[f"`{column}` in <answer>"] = [f"<think>\n</think>\n<answer>{text}</answer>" for text in own]
    return {**kinds, "empty": [""] * len(examples)}


def _tokenizer(config: RewardCheckConfig) -> Callable[[str], list[int]]:
    if config.model is None:
        return lambda text: [0] * -(-len(text.encode()) // 4)
    from raytune_rl.models.load import load_tokenizer, resolve_path

    tokenizer: Any = load_tokenizer(resolve_path(config.model, use_hf=config.use_hf))
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


def _score(
    sandbox: Sandbox,
    kind: str,
    texts: Sequence[str],
    examples: Sequence[Example],
    names: Sequence[str],
    ids: Callable[[str], list[int]],
) -> Tried:
    values, failures = [], []
    seconds = np.zeros(len(sandbox.names))
    for start in range(0, len(texts), CHUNK):
        rows = range(start, min(start + CHUNK, len(texts)))
        part = [texts[row] for row in rows]
        scores = sandbox.score(part, _columns(part, rows, examples, names, ids))
        values.append(scores.values)
        failures += [Failure(start + f.row, f.function, f.kind, f.message) for f in scores.failures]
        seconds += scores.seconds
    return Tried(kind, np.concatenate(values), tuple(failures), seconds)


def _columns(
    texts: Sequence[str],
    rows: Sequence[int],
    examples: Sequence[Example],
    names: Sequence[str],
    ids: Callable[[str], list[int]],
) -> dict[str, Any]:
    tokens = [ids(text) for text in texts]
    media = {
        name: [[_as_reward_sees(ref) for ref in getattr(examples[row], name)] for row in rows]
        for name in TAGS
        if any(getattr(example, name) for example in examples)
    }
    return {
        **{name: [examples[row].extra.get(name) for row in rows] for name in names},
        "messages": with_completions(
            [[m.for_template() for m in examples[row].messages] for row in rows], texts
        ),
        **media,
        "prompt_id": [str(row) for row in rows],
        "request_id": [f"{row}-0" for row in rows],
        "finish_reason": ["stop"] * len(rows),
        "is_truncated": [False] * len(rows),
        "completion_tokens": [len(row) for row in tokens],
        "response_token_ids": tokens,
        "num_turns": [1] * len(rows),
        "rollout_infos": [{} for _ in rows],
        "trainer_state": TrainerState(0, 1),
    }


def _as_reward_sees(ref: MediaRef) -> Any:
    if isinstance(ref, tuple):
        return [_as_reward_sees(frame) for frame in ref]
    data = isinstance(ref, bytes)
    return {"path": None if data else ref, "bytes": ref if data else None}


def _show(
    console: Console,
    config: RewardCheckConfig,
    sandbox: Sandbox,
    tried: Sequence[Tried],
    examples: Sequence[Example],
    sample_rows: int,
    bad: int,
) -> None:
    bad_rows = f", {number(bad)} bad rows left out" if bad else ""
    console.print(
        f"{number(len(examples))} of {number(sample_rows)} rows of {' '.join(config.dataset)}{bad_rows}"
    )
    wanted = {one for required in sandbox.required for column in required for one in column.split(" or ")}
    if config.model is None and wanted & {"completion_tokens", "response_token_ids"}:
        console.print(Text("Note: without --model a token is taken for four bytes", style="yellow"))
    weights = config.reward_weights or (1.0,) * len(sandbox.names)
    for trial in tried:
        table = Table(
            box=box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
            title=f"Completion: {trial.kind}",
            title_justify="left",
        )
        for heading in ("reward", "mean", "low", "high", "values", "none", "failed", "ms"):
            text, narrow = heading in ("reward", "values"), heading != "values"
            justify: Literal["left", "right"] = "left" if text else "right"
            table.add_column(heading, justify=justify, no_wrap=narrow, min_width=None if narrow else 16)
        for column, name in enumerate(sandbox.names):
            failed = sum(f.function == name for f in trial.failures)
            spent = 1000 * trial.seconds[column] / max(len(examples), 1)
            table.add_row(*_cells(name, trial.values[:, column], failed), f"{spent:.2f}")
        table.add_section()
        failed_in = failed_entries(trial.failures, len(trial.values), sandbox.names, sandbox.labels)
        known = known_rewards(trial.values, weights, failed_in)
        unknown = np.isnan(known).all(axis=1) & failed_in.any(axis=1)
        table.add_row(*_cells("in all", combine_rewards(known, weights), int(unknown.sum())), "")
        console.print(table)
    for line in _reasons(tried, examples):
        console.print(Text(line, style="red"))


def _cells(name: str, values: NDArray[np.float64], failed: int) -> list[Text]:
    known = values[np.isfinite(values)]
    common = Counter(f"{value:.3g}" for value in known).most_common(4)
    shown = ", ".join(f"{value}: {number(n)}" for value, n in common[:3]) + (", ..." if common[3:] else "")
    extremes = [f"{f(known):.3g}" if len(known) else "" for f in (np.mean, np.min, np.max)]
    cells = [name, *extremes, shown, number(len(values) - len(known) - failed), number(failed)]
    return [Text(cell) for cell in cells]


def _reasons(tried: Sequence[Tried], examples: Sequence[Example]) -> list[str]:
    """Each distinct way to fail, with how often and where first."""
    first: dict[tuple[str, str, str], tuple[int, str]] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    for trial in tried:
        for failure in trial.failures:
            key = (failure.function, failure.kind, trial.kind)
            counts[key] += 1
            first.setdefault(key, (failure.row, failure.message))
    lines = []
    for (function, kind, completion), count in counts.items():
        row, message = first[function, kind, completion]
        where = f"{examples[row].source}:{examples[row].line}"
        lines.append(f"{function}, {completion}: {number(count)} x {kind}; first {where}: {message}")
    return lines


def _refuse_useless(sandbox: Sandbox, tried: Sequence[Tried]) -> None:
    values = np.concatenate([trial.values for trial in tried])
    for column, name in enumerate(sandbox.names):
        failed = [f for trial in tried for f in trial.failures if f.function == name]
        if failed and not np.isfinite(values[:, column]).any():
            raise RewardError(f"Reward `{name}` scored nothing at all: {failed[0].message}")
