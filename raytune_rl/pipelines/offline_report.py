"""Reports of a run over rows that are there beforehand: its plan, its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raytune_rl.config import PreferenceConfig, SFTConfig
from raytune_rl.config.batching import SFTSchedule
from raytune_rl.data.packing import Packs
from raytune_rl.groups import specs
from raytune_rl.groups.sizes import Groups
from raytune_rl.pipelines.report import (
    SHARED_PROMPTS,
    cluster_section,
    data_section,
    epochs_not_reached,
    group_plans,
    output_section,
    sharing_in_words,
    trainer,
)
from raytune_rl.pipelines.run_summary import run_summary
from raytune_rl.protocol.data import SHARED, Account, TokenSet
from raytune_rl.tracking.plan import RunPlan, Section
from raytune_rl.tracking.summary import Change, RunSummary

if TYPE_CHECKING:
    from raytune_rl.pipelines.lifecycle import ResumePoint, Run, RunResult
    from raytune_rl.pipelines.objective import Objective
    from raytune_rl.runtime.cluster import ClusterInfo

OfflineConfig = SFTConfig | PreferenceConfig


def plan_of(
    config: OfflineConfig,
    objective: Objective,
    groups: Groups,
    schedule: SFTSchedule,
    train: TokenSet,
    held_out: TokenSet | None,
    resume_point: ResumePoint,
    cluster: ClusterInfo,
    notices: Sequence[str],
    packs: Packs | None = None,
) -> RunPlan:
    """The plan of a run over rows that are there beforehand."""
    shape = objective.shape
    trained_rows = shape.rows_of(np.arange(len(train) // shape.rows), shape.trained)
    tokens, trained = int(train.lengths[trained_rows].sum()), int(train.loss_lengths[trained_rows].sum())
    unit = shape.unit if packs is None else f"packs of up to {packs.capacity:,} tokens"
    span = "a window" if config.streams else "an epoch"
    rows = [
        ("each step", f"{schedule.rows_per_step} {unit}"),
        ("optimizer steps", f"{schedule.total_steps:,} ({schedule.steps_per_epoch:,} {span})"),
        *([] if packs is None else [("packing", f"{len(train):,} rows in {len(packs):,} packs")]),
        (f"tokens {span}", f"{tokens:,}, of which {trained:,} are trained on"),
    ]
    labels = train.values["label"][trained_rows] if "label" in train.values else None
    if labels is not None:
        desirable = int(labels.sum())
        rows.append(("labels", f"{desirable:,} desirable, {len(labels) - desirable:,} undesirable"))
        if desirable in (0, len(labels)):
            notices = [*notices, "all rows have the same label, so there is nothing to tell apart"]
    if SHARED in train.values and len(shape.trained) > 1:
        rows.append((SHARED_PROMPTS, _shared_prompts(config, train)))
    if objective.needs_reference:
        rows.append(("reference", _reference(config)))
    inside = {"policy": trainer(config, groups), "reference": "until its log-probs are known"}
    return RunPlan(
        f"{objective.title} on {config.model}, {config.train_type}",
        group_plans(groups, inside),
        [
            cluster_section(cluster),
            data_section(
                train.account,
                len(train) // shape.rows,
                held_out.account if held_out else None,
                len(held_out or ()) // shape.rows,
                shape.unit,
            ),
            Section("Training", rows),
            output_section(config, resume_point, schedule),
        ],
        [*notices, *epochs_not_reached(config, schedule)],
    )


def _shared_prompts(config: OfflineConfig, train: TokenSet) -> str:
    """How what both sides of a pair begin with is computed."""
    if isinstance(config, SFTConfig) or specs.sharing(config) == "false":
        return "computed for each side of a pair"
    return sharing_in_words(config.prefix_sharing, float(train.values[SHARED][::2].sum()), "an epoch")


def _reference(config: OfflineConfig) -> str:
    named = "the model before its first step"
    if isinstance(config, PreferenceConfig) and config.own_reference:
        named = " with ".join((str(config.ref_model or config.model), *config.ref_adapters))
    return f"{named}; its log-probs are taken once"


def with_margin(metrics: Mapping[str, float]) -> dict[str, float]:
    """Adds the lead of desirable rows over undesirable ones, where rows are no pairs that have one each."""
    chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
    if chosen is None or rejected is None:
        return dict(metrics)
    return {"rewards/margins": chosen - rejected, **metrics}


def summary_of(
    config: OfflineConfig,
    objective: Objective,
    run: Run,
    accounts: tuple[Account, Account | None],
    result: RunResult,
) -> RunSummary:
    """The end of a run over rows in one screen."""
    changes = {"loss (training)": Change(run.first_metrics.get("loss"), run.last_metrics.get("loss"))}
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        if f"eval_{name}" in result.before:
            changes[f"{name} (held out)"] = Change(
                result.before[f"eval_{name}"], result.after.get(f"eval_{name}")
            )
    return run_summary(config, objective.title, changes, run, accounts, result)
