"""The metrics of generations, evaluations and optimizer steps, and the rows of completions.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.experience import Experience
from raytune_rl.protocol.tickets import FleetLoad
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.tracking.completions import CompletionRow

if TYPE_CHECKING:
    from raytune_rl.pipelines.lifecycle import Run
    from raytune_rl.protocol.train import StepReport


def fleet_metrics(load: FleetLoad) -> dict[str, float]:
    """Engines that serve, that wait for a place, and that came and went since the start."""
    counts = {
        "members": load.members,
        "unplaced": load.unplaced,
        "joined": load.joined,
        "left": load.left,
        "lost": load.lost,
    }
    return {f"fleet/{name}": float(count) for name, count in counts.items()}


def batch_metrics(experience: Experience) -> dict[str, float]:
    """Rewards and lengths of a generation, under ms-swift's names."""
    batch = experience.batch
    return {
        **_rewards(experience),
        **_lengths(batch),
        "reward_failures": float(len(experience.scored.failures)),
        "weight_version": float(max(t.episode.version for t in batch)),
        **_turns(batch),
    }


_GRADED = ("CosineReward", "RepetitionPenalty", "SoftOverlong")
"""Rewards of which 0 and 1 say neither failed nor passed, even where they are all 0."""


def evaluation_metrics(experience: Experience) -> dict[str, float]:
    """The same of an evaluation, under `eval_`, and pass@k of each reward that is either 0 or 1: how likely
    one of k completions of a prompt has 1 at least, on average over prompts; for k as many as were sampled,
    and the powers of two below. Completions without a reward are neither right nor wrong: a prompt counts for
    k if k of its completions have one.
    """
    metrics = {
        **_rewards(experience),
        **_lengths(experience.batch),
        "reward_failures": float(len(experience.scored.failures)),
        "unscored_completions": float(np.sum(~np.isfinite(experience.rewards))),
    }
    _, group_of = np.unique([t.group for t in experience.batch], return_inverse=True)
    each = int(np.bincount(group_of).max())
    for column, label in enumerate(experience.scored.labels):
        values = experience.scored.values[:, column]
        if label not in _GRADED and set(np.unique(values[np.isfinite(values)])) <= {0.0, 1.0}:
            right = np.bincount(group_of, weights=values == 1.0).astype(int)
            known = np.bincount(group_of, weights=np.isfinite(values)).astype(int)
            for k in (*(2**i for i in range(1, each.bit_length()) if 2**i < each), each):
                of_prompts = [pass_at(k, n, c) for n, c in zip(known, right, strict=True) if n >= k]
                if of_prompts:
                    metrics[f"rewards/{label}/pass@{k}"] = float(np.mean(of_prompts))
    return {f"eval_{name}": value for name, value in metrics.items()}


def pass_at(k: int, n: int, right: int) -> float:
    """How likely at least one of k completions is right, given that `right` of n were: the unbiased estimate
    1 - C(n - right, k) / C(n, k) of Chen et al. 2021, "Evaluating large language models trained on code".
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def step_metrics(run: Run, step: StepReport, steps_per_epoch: int) -> dict[str, float]:
    """Counters of an optimizer step."""
    return {
        "epoch": (run.step + 1) / steps_per_epoch,
        "memory(GiB)": step.memory_gib,
        "num_tokens": float(step.tokens),
        "tokens_per_second": step.tokens / max(run.timer.so_far(), 1e-9),
    }


def _turns(batch: Sequence[Trajectory]) -> dict[str, float]:
    """Of conversations of several turns."""
    if all(t.dialogue is None for t in batch):
        return {}
    return {
        "num_turns": float(np.mean([t.episode.turns for t in batch])),
        "scheduler_failures": float(sum(bool(t.episode.failure) for t in batch)),
    }


def _rewards(experience: Experience) -> dict[str, float]:
    scored = experience.scored
    metrics = {"reward": _mean(experience.rewards)}
    for column, label in enumerate(scored.labels):
        values = scored.values[:, column]
        metrics[f"rewards/{label}/mean"] = _mean(values)
        metrics[f"rewards/{label}/std"] = _std(values)
    return metrics


def _lengths(batch: Sequence[Trajectory]) -> dict[str, float]:
    lengths = [t.episode.completion_tokens for t in batch]
    return {
        "completions/mean_length": float(np.mean(lengths)),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": float(np.mean([t.episode.finish_reason == "length" for t in batch])),
    }


def completion_rows(
    step: int,
    experience: Experience,
    prompts: Sequence[str],
    texts: Sequence[str],
    advantages: NDArray[np.float32] | None,
    dialogues: Sequence[Mapping[str, Any]] = (),
    media: Sequence[Sequence[str]] = (),
) -> list[CompletionRow]:
    """One row a completion, for completions.jsonl; without advantages for what was replaced, with all
    messages where the model had several turns, and the names of its prompt's media if the data has any."""
    scored, rewards = experience.scored, experience.rewards
    return [
        CompletionRow(
            step=step,
            prompt=prompts[t.prompt],
            completion=text,
            tokens=t.episode.completion_tokens,
            rewards={name: _or_none(scored.values[i, c]) for c, name in enumerate(scored.labels)},
            reward=_or_none(rewards[i]),
            advantage=None if advantages is None else float(advantages[i]),
            weight_version=t.episode.version,
            finish_reason=t.episode.finish_reason,
            extra={
                **({"num_turns": t.episode.turns, **dialogues[i]} if dialogues else {}),
                **({"media": list(media[i])} if media else {}),
            },
        )
        for i, (t, text) in enumerate(zip(experience.batch, texts, strict=True))
    ]


def _mean(values: Any) -> float:
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if len(known) else float("nan")


def _std(values: Any) -> float:
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
