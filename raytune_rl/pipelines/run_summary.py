"""The end of a run in one screen, and the commands to go on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_rl.config import PreferenceConfig, RLHFConfig, resolved
from raytune_rl.config.commands import TrainConfig
from raytune_rl.prepare.sets import quarantined
from raytune_rl.protocol.data import Account
from raytune_rl.tracking.summary import Change, RunSummary

if TYPE_CHECKING:
    from raytune_rl.pipelines.lifecycle import Run, RunResult
    from raytune_rl.pipelines.run_state import RunState


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
    return replace(
        run_summary(config, config.rlhf_type.upper(), changes, run, accounts, result),
        prompts=state.account(),
        reward_failures=dict(state.reward_failures),
        lost_workers=dict(state.lost_workers),
        weight_versions=state.generation + 1,
        max_logp_gap=state.max_gap,
        notices=_without_signal(state),
    )


def run_summary(
    config: TrainConfig,
    title: str,
    changes: dict[str, Change],
    run: Run,
    accounts: tuple[Account, Account | None],
    result: RunResult,
) -> RunSummary:
    """What is said at the end of any run; `accounts` are of the data and of the held-out ones."""
    return RunSummary(
        title=f"{title} on {config.model}, {config.train_type}",
        status=result.status,
        steps=result.steps,
        total_steps=result.total_steps,
        seconds=run.seconds,
        output_dir=result.run_dir,
        changes=changes,
        quarantined=quarantined(*accounts),
        faults=run.faults.rows(),
        non_finite=dict(run.logger.non_finite),
        last_checkpoint=result.last_checkpoint,
        best_checkpoint=result.best_checkpoint,
        next_commands=next_commands(config, result),
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
