"""The reports of a run: the plan before it, the metrics of each step, the summary after it. Pure: values in,
values out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.algorithms.experience import Experience
from raytune_rl.config import PreferenceConfig, RLHFConfig, resolved
from raytune_rl.config.batching import GRPOBatch, GRPOSchedule, SFTSchedule
from raytune_rl.config.commands import TrainConfig
from raytune_rl.groups import lora_sync, specs
from raytune_rl.groups.sizes import Groups, teacher_groups
from raytune_rl.pipelines import recovery
from raytune_rl.pipelines.ahead_plan import rollout_section
from raytune_rl.pipelines.online_algorithms import Algorithm, in_words
from raytune_rl.prepare.sets import quarantined
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.protocol.tickets import FleetLoad
from raytune_rl.protocol.trajectory import Trajectory
from raytune_rl.tracking.completions import CompletionRow
from raytune_rl.tracking.plan import GenerationPlan, GroupPlan, RunPlan, Section
from raytune_rl.tracking.summary import Change, RunSummary

if TYPE_CHECKING:
    from raytune_rl.pipelines.lifecycle import ResumePoint, Run, RunResult
    from raytune_rl.pipelines.online_data import OnlineData
    from raytune_rl.pipelines.run_state import RunState
    from raytune_rl.protocol.train import StepReport
    from raytune_rl.runtime.cluster import ClusterInfo
    from raytune_rl.runtime.placement import GroupSpec


# -- before
# ---------------------------------------------------------------------------------------------------


def online_plan(
    config: RLHFConfig,
    algorithm: Algorithm,
    groups: Groups,
    data: OnlineData,
    resume_point: ResumePoint,
    cluster: ClusterInfo,
    notices: Sequence[str],
) -> RunPlan:
    """The plan of a GRPO run."""
    train, held_out, schedule = data.train, data.held_out, data.schedule
    batch = schedule.batch
    generation = GenerationPlan(
        batch.prompts_per_generation,
        batch.num_generations,
        batch.optimizer_steps_per_generation * config.num_iterations,
        schedule.total_steps,
        data.longest,
        config.max_completion_length,
    )
    arrive = (
        "as an adapter" if lora_sync.publish_mode(config, train.account.takes_media) == "adapter" else "whole"
    )
    stays = "frozen" if config.teacher_sync_steps is None else "follows the policy"
    inside = {
        "policy": trainer(config, groups),
        "rollout": f"vLLM, weights arrive {arrive}",
        "reference": "for the KL term",
        **dict.fromkeys(teacher_groups(config), f"{stays}, judges every token"),
        "critic": "DeepSpeed, predicts what the rest of a completion will earn",
        "reward": " + ".join(config.reward_funcs),
        "reward_model": " + ".join(config.reward_model),
    }
    per = batch.optimizer_steps_per_generation * config.num_iterations
    extra = []
    if groups.on_gpu:
        share = specs.gpu_share(config, groups)
        extra.append(f"vLLM takes {share:.0%} of each of its GPUs' memory (--vllm_gpu_memory_utilization)")
    if per > 1 and config.save_strategy == "steps" and config.save_steps % per:
        extra.append(
            f"a generation feeds {per} optimizer steps and checkpoints are written between generations: "
            f"--save_steps {config.save_steps} takes effect at the end of the generation it falls into"
        )
    if config.dynamic_sample:
        extra.append(
            "dynamic sampling draws further prompts for those that teach nothing, so the run goes through "
            "the data faster than its steps tell; the metric `epoch` counts what was drawn"
            + (", --save_strategy and --eval_strategy epoch count steps" if _epochs_asked(config) else "")
        )
    elif schedule.prompts_unused_per_epoch:
        extra.append(
            f"{schedule.prompts_unused_per_epoch} of {len(train)} prompts do not fill a batch and are left "
            "out of each epoch "
            "(others each time, as the order is shuffled)"
        )
    return RunPlan(
        f"{config.rlhf_type.upper()} on {config.model}, {config.train_type}",
        group_plans(groups, inside),
        [
            cluster_section(cluster),
            data_section(
                train.account, len(train), held_out.account if held_out else None, len(held_out or ())
            ),
            with_row(generation.section(), _shared_prompts(config, train, batch)),
            rollout_section(config, groups, schedule),
            Section("Algorithm", in_words(config, algorithm)),
            output_section(config, resume_point, schedule),
        ],
        [*notices, *epochs_not_reached(config, schedule), *extra],
    )


def _shared_prompts(config: RLHFConfig, train: PromptSet, batch: GRPOBatch) -> str:
    """How prompts are computed in training."""
    if specs.sharing(config) == "false":
        return "computed for each completion in training"
    mean = float(np.mean(train.lengths))
    saved = batch.prompts_per_generation * (batch.num_generations - 1) * mean
    return sharing_in_words(config.prefix_sharing, saved, "a generation")


def sharing_in_words(sharing: str, tokens: float, span: str) -> str:
    """How many tokens are not computed again, where rows share what they can."""
    when = "where that is sooner" if sharing == "auto" else "always"
    return f"computed once for all that begin with them, {when}: up to {tokens:,.0f} tokens {span} saved"


def with_row(section: Section, shared_prompts: str) -> Section:
    """A section that also says how prompts are computed."""
    return Section(section.title, [*section.rows, (SHARED_PROMPTS, shared_prompts)])


SHARED_PROMPTS = "shared prompts"


def trainer(config: TrainConfig, groups: Groups) -> str:
    zero = (
        config.deepspeed
        if isinstance(config.deepspeed, str)
        else "zero2"
        if config.deepspeed is None
        else "own JSON"
    )
    return f"DeepSpeed {zero}, {specs.dtype(config, groups.on_gpu)}, {config.train_type}"


def group_plans(groups: Groups, inside: Mapping[str, str]) -> list[GroupPlan]:
    return [
        GroupPlan(
            spec.name,
            spec.workers,
            spec.cpus,
            spec.gpus,
            _place(spec, groups),
            inside[spec.name],
        )
        for spec in groups.specs
    ]


def _place(spec: GroupSpec, groups: Groups) -> str:
    if spec.name == "rollout" and groups.elastic is not None:
        return f"up to {groups.elastic.most}, each on its own"
    if spec.colocate_with:
        return f"with {spec.colocate_with}"
    return f"{spec.per_node} per node" if spec.per_node else ""


def cluster_section(cluster: ClusterInfo) -> Section:
    where = "started here" if cluster.started_here else f"joined at {cluster.address}"
    resources = f"{len(cluster.nodes)} node(s), {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs free"
    return Section(
        "Cluster",
        [
            ("Ray", where),
            ("resources", resources),
            ("object store", f"{cluster.object_store_bytes / 2**30:.1f} GiB"),
        ],
    )


def data_section(
    train: Account, rows: int, held_out: Account | None, held_out_rows: int, unit: str = "rows"
) -> Section:
    lines = [(s.name, f"{s.rows:,} rows, {s.bad:,} bad, {s.taken:,} taken") for s in train.sources]
    lines.append(("train on", f"{rows:,} {unit}"))
    lines += [(reason, f"{count:,} {unit} left out") for reason, count in train.dropped.items()]
    for modality, shown in train.media.shown.items():
        lines.append((f"{modality}s", f"{shown:,}, {train.media.distinct[modality]:,} distinct"))
    if train.media.shown:
        stored = train.media.stored_bytes
        where = f"{stored / 2**20:,.1f} MiB in the object store" if stored else "read where they lie"
        lines.append(("their files", where))
    if train.quarantine:
        lines.append(("rows left out are in", train.quarantine))
    if held_out is not None:
        lines += _held_out_lines(train, held_out, held_out_rows, unit)
    return Section("Data", lines)


def _held_out_lines(train: Account, held_out: Account, rows: int, unit: str) -> list[tuple[str, str]]:
    lines = []
    if held_out.sources != train.sources:
        lines += [(s.name, f"{s.rows:,} rows, {s.bad:,} bad, {s.taken:,} taken") for s in held_out.sources]
    lines.append(("held out", f"{rows:,} {unit}"))
    lines += [
        (f"{reason} (held out)", f"{count:,} {unit} left out") for reason, count in held_out.dropped.items()
    ]
    if held_out.quarantine and held_out.quarantine != train.quarantine:
        lines.append(("rows left out are in", held_out.quarantine))
    return lines


def output_section(
    config: TrainConfig, resume_point: ResumePoint, schedule: GRPOSchedule | SFTSchedule
) -> Section:
    often = f"{resolved.checkpoint_interval(config, schedule.steps_per_epoch):,} steps"
    if config.save_strategy == "epoch":
        often = f"epoch ({often})"
    saved = ("checkpoint every", f"{often} and at the end")
    if config.save_strategy == "no":
        saved = ("checkpoints", "none (--save_strategy no): what is trained is gone when the run ends")
    rows = [("folder", str(resume_point.run_dir.path)), saved, recovery.in_words(config)]
    if resume_point.checkpoint is not None:
        rows.append(("goes on from", f"{resume_point.checkpoint.name}, step {resume_point.step:,}"))
    return Section("Output", rows)


def _epochs_asked(config: TrainConfig) -> list[str]:
    """The flags that ask for something at the end of each epoch, where it can be."""
    flags = ["--save_strategy epoch"] if config.save_strategy == "epoch" else []
    if resolved.has_validation(config) and resolved.eval_strategy(config) == "epoch":
        flags.append("--eval_strategy epoch")
    return flags


def epochs_not_reached(config: TrainConfig, schedule: GRPOSchedule | SFTSchedule) -> list[str]:
    """A notice if the run ends before its first epoch does, although something should happen then."""
    flags = _epochs_asked(config)
    if not flags or schedule.total_steps >= schedule.steps_per_epoch:
        return []
    return [
        f"{' and '.join(flags)}: the run ends after {schedule.total_steps:,} of the "
        f"{schedule.steps_per_epoch:,} steps of its first epoch, so this happens at its end alone"
    ]


# -- during
# ---------------------------------------------------------------------------------------------------


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


# -- after
# ----------------------------------------------------------------------------------------------------


def online_summary(
    config: RLHFConfig,
    run: Run,
    state: RunState,
    accounts: tuple[Account, Account | None],
    result: RunResult,
) -> RunSummary:
    """The end of an online run in one screen; `accounts` are of the prompts and of the held-out ones."""
    changes = {
        "reward (training)": Change(run.first_metrics.get("reward"), run.last_metrics.get("reward")),
    }
    if result.before:
        changes["reward (held out)"] = Change(
            result.before.get("eval_reward"), result.after.get("eval_reward")
        )
    most = f"pass@{resolved.num_generations_eval(config)}"
    fewer = {name for name in result.before if "/pass@" in name and not name.endswith(f"/{most}")}
    for name in result.before:
        if name.startswith("eval_rewards/") and not name.endswith("/std") and name not in fewer:
            label = name.removeprefix("eval_rewards/").removesuffix("/mean")
            changes[f"{label} (held out)"] = Change(result.before[name], result.after.get(name))
    return RunSummary(
        title=f"{config.rlhf_type.upper()} on {config.model}, {config.train_type}",
        status=result.status,
        steps=result.steps,
        total_steps=result.total_steps,
        seconds=run.seconds,
        output_dir=result.run_dir,
        changes=changes,
        prompts=state.account(),
        quarantined=quarantined(*accounts),
        reward_failures=dict(state.reward_failures),
        lost_workers=dict(state.lost_workers),
        weight_versions=state.generation + 1,
        max_logp_gap=state.max_gap,
        faults=run.faults.rows(),
        non_finite=dict(run.logger.non_finite),
        last_checkpoint=result.last_checkpoint,
        best_checkpoint=result.best_checkpoint,
        next_commands=next_commands(config, result),
        notices=_without_signal(state),
    )


def _without_signal(state: RunState) -> list[str]:
    """Generations that taught nothing, or less than they should."""
    notices = []
    silent = state.silent_generations
    if silent:
        notices.append(f"{silent} generation(s) had no group with different rewards: nothing to learn")
    if state.short_generations:
        notices.append(
            f"{state.short_generations} generation(s) could not be filled with groups that have "
            "different rewards: raise --max_resample_times, or give prompts that are neither too hard nor "
            "too easy"
        )
    return notices


def next_commands(config: TrainConfig, result: RunResult) -> dict[str, str]:
    """The commands that a user is likely to want next, ready to be copied."""
    commands = {}
    if result.status == "interrupted" and result.last_checkpoint is not None and not config.save_only_model:
        commands["resume"] = f"add to the same command: --resume_from_checkpoint {result.last_checkpoint}"
    if result.last_checkpoint is None:
        return commands
    checkpoint = _show(result.best_checkpoint or result.last_checkpoint)
    adapter = config.train_type == "lora"
    if not (isinstance(config, PreferenceConfig) and config.rlhf_type == "rm"):
        commands["try it"] = f"raytune-rl infer {'--adapters' if adapter else '--model'} {checkpoint}"
    if adapter:
        commands["merge the adapter"] = f"raytune-rl export --adapters {checkpoint} --merge_lora true"
    return commands


def _show(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
