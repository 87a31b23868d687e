"""The state of an online run: counted as it goes on, saved and restored as one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytune_rl.pipelines.position import POSITION
from raytune_rl.tracking.summary import PromptCounts


@dataclass
class RunState:
    """All that a resumed run needs to go on as if it had never stopped, beside models and steps.

    Attributes:
        generation: Number of the next generation, from 0.
        data: Where the run is in its prompts, as `position.Position.state` has it; empty before the first
            generation, and with dynamic sampling.
        prompts_drawn: Prompts that dynamic sampling has taken from its stream: its whole position.
        prompt_counts: What became of the prompts that were sampled from: "dispatched", "finished", and
            reasons for which groups were replaced.
        prompt_failures: Reason -> prompts that gave nothing to train on.
        reward_failures: "function: kind" -> samples.
        short_generations: Generations that could not be filled with groups that teach.
        silent_generations: Generations that taught nothing at all.
        ahead: Prompts that were asked and are not trained on yet (`--async_generate`).
        lost_workers: Group -> workers that were lost and replaced.
        max_gap: Largest difference of a token's log-prob between policy and engine so far, nats.
    """

    generation: int = 0
    data: dict[str, int] = field(default_factory=dict)
    prompts_drawn: int = 0
    prompt_counts: Counter[str] = field(default_factory=Counter)
    prompt_failures: Counter[str] = field(default_factory=Counter)
    reward_failures: Counter[str] = field(default_factory=Counter)
    short_generations: int = 0
    silent_generations: int = 0
    ahead: int = 0
    lost_workers: Counter[str] = field(default_factory=Counter)
    max_gap: float = 0.0

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> RunState:
        """Of a checkpoint's trainer_state.json; a mapping without any of it is a new run's."""
        return cls(
            generation=int(saved.get("generation", 0)),
            data={name: int(saved[name]) for name in POSITION if name in saved},
            prompts_drawn=int(saved.get("prompts_drawn", 0)),
            prompt_counts=Counter(saved.get("prompt_counts", {})),
            prompt_failures=Counter(saved.get("prompt_failures", {})),
            reward_failures=Counter(saved.get("reward_failures", {})),
            short_generations=int(saved.get("short_generations", 0)),
            silent_generations=int(saved.get("generations_without_signal", 0)),
            ahead=int(saved.get("ahead", 0)),
            lost_workers=Counter(saved.get("lost_workers", {})),
            max_gap=float(saved.get("max_gap", 0.0)),
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values, for trainer_state.json."""
        return {
            "generation": self.generation,
            **self.data,
            "max_gap": self.max_gap,
            "lost_workers": dict(self.lost_workers),
            "generations_without_signal": self.silent_generations,
            "prompts_drawn": self.prompts_drawn,
            "prompt_counts": dict(self.prompt_counts),
            "prompt_failures": dict(self.prompt_failures),
            "reward_failures": dict(self.reward_failures),
            "short_generations": self.short_generations,
            "ahead": self.ahead,
        }

    def account(self) -> PromptCounts:
        """The fate of every prompt that was sampled from for training."""
        counts, failures = dict(+self.prompt_counts), dict(+self.prompt_failures)
        dispatched, finished = counts.pop("dispatched", 0), counts.pop("finished", 0)
        return PromptCounts(dispatched, finished, counts, failures, self.ahead)
