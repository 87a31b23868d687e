"""The plan of a run, before anything is started. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.batching import GRPOBatch, GRPOSchedule, SFTSchedule
from raytune_rl.config.commands import TrainConfig
from raytune_rl.groups import lora_sync, specs
from raytune_rl.groups.sizes import Groups, teacher_groups
from raytune_rl.pipelines import recovery
from raytune_rl.pipelines.ahead_plan import rollout_section
from raytune_rl.pipelines.online_algorithms import Algorithm, in_words
from raytune_rl.protocol.data import Account, PromptSet
from raytune_rl.tracking.plan import GenerationPlan, GroupPlan, RunPlan, Section

if TYPE_CHECKING:
    from raytune_rl.pipelines.lifecycle import ResumePoint
    from raytune_rl.pipelines.online_data import OnlineData
    from raytune_rl.runtime.cluster import ClusterInfo
    from raytune_rl.runtime.placement import GroupSpec


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
    arrive = "as what changed where that is half as large" if config.weight_delta else "whole"
    if lora_sync.publish_mode(config, train.account.takes_media) == "adapter":
        arrive = "as an adapter"
    stays = "frozen" if config.teacher_sync_steps is None else "follows the policy"
    stays = "vLLM, frozen" if config.teacher_backend == "vllm" else stays
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
