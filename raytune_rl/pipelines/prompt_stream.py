"""Prompts one by one, each with the seeds of its completions, in the order of the synchronous loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raytune_rl.config import RLHFConfig
from raytune_rl.data.sampler import BatchPlan, stretch
from raytune_rl.groups.seeds import row_seeds
from raytune_rl.pipelines.position import PromptDraw
from raytune_rl.pipelines.run_state import RunState


@dataclass(frozen=True)
class Drawn:
    """A prompt that is the next to be asked.

    Attributes:
        row: Row in the prompt set.
        seeds: One a completion.
    """

    row: int
    seeds: tuple[int, ...]


class PromptStream:
    """Draws a generation's prompts at a time and gives them one by one.

    Without `--dynamic_sample` these are the prompts and the seeds of the synchronous loop. With it, one
    endless stream, the epochs one after another.

    Args:
        config: Of the run.
        plan: The order, and how many prompts a generation takes.
        state: Of the run: where it goes on, and where its position is kept.
    """

    def __init__(self, config: RLHFConfig, plan: BatchPlan, state: RunState) -> None:
        self._config, self._plan, self._state = config, plan, state
        self._draw = PromptDraw(plan, {"generation": state.generation, **state.data})
        self._batch = state.generation
        self._rest: deque[Drawn] = deque()

    def next(self) -> Drawn:
        """The next prompt."""
        if not self._rest:
            self._refill()
        if self._config.dynamic_sample:
            self._state.prompts_drawn += 1
        return self._rest.popleft()

    def _refill(self) -> None:
        config, batch = self._config, self._batch
        if config.dynamic_sample:
            order = (config.data_seed, config.dataset_shuffle)
            rows = stretch(self._plan.n, self._state.prompts_drawn, self._plan.batch_size, *order).tolist()
            batch *= 1 + config.max_resample_times
        else:
            rows = self._draw.next()
            self._state.data = self._draw.state()
        seeds = row_seeds(config.seed, batch, rows, config.num_generations)
        self._rest.extend(Drawn(row, own) for row, own in zip(rows, seeds, strict=True))
        self._batch += 1

    def state_dict(self) -> dict[str, Any]:
        """As JSON-able values, beside what the run's state has."""
        return {"batch": self._batch, "rest": [[drawn.row, list(drawn.seeds)] for drawn in self._rest]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a checkpoint was made."""
        self._batch = int(state["batch"])
        self._rest = deque(Drawn(row, tuple(seeds)) for row, seeds in state["rest"])
