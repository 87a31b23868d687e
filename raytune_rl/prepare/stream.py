"""Rows that are read and tokenized while the run trains on others: memory holds two windows of them.

A process of its own on the driver's machine makes the windows, each while the one before it is trained on.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_rl.config import SFTConfig
from raytune_rl.data.example import Task
from raytune_rl.errors import WorkerDiedError
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.sets import again_if_lost, token_set, token_sets, without_gpus
from raytune_rl.protocol.data import Account, SourceCounts, TokenSet
from raytune_rl.runtime.group import end
from raytune_rl.tracking.files import read_jsonl


class StreamWorker:
    """Makes windows. Run as an actor, in the driver's folder: relative paths are the user's."""

    def __init__(
        self, folder: str, config: SFTConfig, task: Task, quarantine: str, places: MediaPlaces
    ) -> None:
        from raytune_rl.data.rules import Identity
        from raytune_rl.data.stream import RowWindows
        from raytune_rl.prepare.task import rows_encoder

        os.chdir(folder)
        self._quarantine = Path(quarantine)
        self._encode = rows_encoder(config, task, places)
        # A stream comes by a row more than once, and a resumed one reads its window anew.
        self._held = {
            (str(row.get("source")), int(row.get("line", 0))) for row in read_jsonl(self._quarantine)
        }
        self._windows = RowWindows(
            config.dataset,
            task=task,
            size=config.shuffle_buffer_size,
            system=config.system,
            columns=config.columns,
            strict=config.strict,
            quarantine_path=self._quarantine,
            use_hf=config.use_hf,
            identity=Identity(config.model_name, config.model_author),
        )

    def window(self, number: int) -> tuple[Any, ...]:
        """Columns and facts of a window; numbers may only go up."""
        loaded = self._windows.window(number)
        return self._encode(loaded.examples, loaded.report, self._quarantine, held=self._held)


class Stream:
    """Windows one after the other; the next is being made while the present one is used.

    Attributes:
        number: The present window, from 0 over the whole run.
        account: What became of the rows of all windows of this process.
    """

    def __init__(
        self, config: SFTConfig, task: Task, quarantine: Path, one_machine: bool, first: int, stack: ExitStack
    ) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here, "max_restarts": 0, **without_gpus()}
        self._config = config
        arguments = (str(Path.cwd()), config, task, str(quarantine), MediaPlaces.of(config, one_machine))
        self._start = lambda: ray.remote(StreamWorker).options(**options).remote(*arguments)
        self._worker = self._start()
        stack.callback(lambda: end(self._worker))
        self.number = first - 1
        self.account: Account | None = None
        self._coming = self._ask(first)

    def next(self) -> TokenSet:
        """The next window, once it is there."""
        window = again_if_lost(self._window, _said)
        self.number += 1
        self._coming = self._ask(self.number + 1)
        self.account = window.account if self.account is None else _added(self.account, window.account)
        return window

    def _window(self) -> TokenSet:
        try:
            return token_set(self._coming, self._config)
        except WorkerDiedError:
            end(self._worker)
            self._worker = self._start()
            self._coming = self._ask(self.number + 1)
            raise

    def _ask(self, number: int) -> list[Any]:
        return self._worker.window.options(num_returns=2).remote(number)


def _said(sentence: str) -> None:
    print(f"Note: the data task: {sentence}", file=sys.stderr, flush=True)


def held_out_of(config: SFTConfig, task: Task, quarantine: Path, one_machine: bool) -> TokenSet | None:
    """The rows of `--val_dataset`, all of them."""
    if not config.val_dataset:
        return None
    changed = {"dataset": config.val_dataset, "val_dataset": (), "dataset_shuffle": False}
    alone = config.model_copy(update=changed)
    return token_sets(alone, task, quarantine.with_name("quarantine-val.jsonl"), one_machine=one_machine)[0]


def _added(before: Account, window: Account) -> Account:
    sources = [
        SourceCounts(old.name, old.rows + new.rows, old.bad + new.bad, old.taken + new.taken)
        for old, new in zip(before.sources, window.sources, strict=True)
    ]
    dropped = dict(Counter(before.dropped) + Counter(window.dropped))
    return replace(
        before,
        sources=tuple(sources),
        dropped=dropped,
        quarantine=window.quarantine or before.quarantine,
    )
