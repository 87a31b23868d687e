"""Reading the data sets of a run, and the files of the rows that are left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from raytune_rl.config.commands import TrainConfig
from raytune_rl.data.example import Task
from raytune_rl.prepare.progress import RowProgress, Tell
from raytune_rl.redaction import redact_texts


def quarantine_dropped(dropped: Any, path: Path, held: set[tuple[str, int]] | None = None) -> Path | None:
    """Adds rows that were left out while encoding to the quarantine file, each once.

    Args:
        dropped: The rows.
        path: The file.
        held: Places of rows that it has already, to be added to.

    Returns:
        The file, if there are any.
    """
    held = set() if held is None else held
    lines = []
    for drop in dropped:
        if (drop.source, drop.line) not in held:
            held.add((drop.source, drop.line))
            reason = f"{drop.reason}: {drop.detail}".rstrip(": ")
            lines.append({"source": drop.source, "line": drop.line, "reason": reason})
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(redact_texts(line), ensure_ascii=False) + "\n" for line in lines)
    return path if dropped else None


def quarantines(config: TrainConfig, quarantine: Path) -> tuple[Path, Path]:
    """For the rows to train on and for the held-out ones, which may come from the same data."""
    return quarantine, quarantine.with_name("quarantine-val.jsonl") if config.val_dataset else quarantine


def load_sets(
    config: TrainConfig, task: Task, quarantine: Path, tell: Tell = lambda _: None
) -> tuple[Any, Any]:
    """(examples, report) to train on, and held out or None."""
    from raytune_rl.data.load import load_examples, split_examples
    from raytune_rl.data.rules import Identity

    def load(specs: Any, shuffle: bool, path: Path) -> Any:
        return load_examples(
            specs,
            task=task,
            system=config.system,
            columns=config.columns,
            strict=config.strict,
            shuffle=shuffle,
            seed=config.data_seed,
            quarantine_path=path,
            use_hf=config.use_hf,
            identity=Identity(config.model_name, config.model_author),
            progress=progress,
        )

    progress = RowProgress("read", tell)
    train = load(config.dataset, config.dataset_shuffle, quarantine)
    if unused := _unused_identity(config):
        train = replace(train, report=replace(train.report, notices=(unused, *train.report.notices)))
    if config.val_dataset:
        held_out = load(config.val_dataset, False, quarantines(config, quarantine)[1])
        return (train.examples, train.report), (held_out.examples, held_out.report)
    examples, rest = split_examples(train.examples, config.split_dataset_ratio, config.data_seed)
    return (examples, train.report), (rest, train.report) if rest else None


def _unused_identity(config: TrainConfig) -> str | None:
    """A sentence where a name or author was given, and no data set asks for it."""
    from raytune_rl.data.picks import leaves_identity_open
    from raytune_rl.data.specs import parse_spec

    if not (config.model_name or config.model_author):
        return None
    if any(
        leaves_identity_open(parse_spec(text, use_hf=config.use_hf))
        for text in (*config.dataset, *config.val_dataset)
    ):
        return None
    return (
        "--model_name and --model_author have no effect: no data set leaves them open, as self-cognition does"
    )
