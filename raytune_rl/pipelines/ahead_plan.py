"""How sampling and training follow each other, in words, for the plan."""

from __future__ import annotations

from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.batching import GRPOSchedule
from raytune_rl.groups.gpu_sharing import take_turns
from raytune_rl.groups.sizes import Groups
from raytune_rl.tracking.plan import Section
from raytune_rl.tracking.text import number

IN_FLIGHT = {
    "keep": "go on with their cache",
    "recompute": "go on, their cache is computed anew",
    "abort": "are begun again",
    "drain": "are finished first",
}


def rollout_section(config: RLHFConfig, groups: Groups, schedule: GRPOSchedule) -> Section:
    """The mode, the bound on staleness, and what is in flight at most."""
    batch, bound = schedule.batch, resolved.max_staleness(config)
    most = batch.prompts_per_generation * (bound + 1)
    each = f"{number(most)} prompts x {number(batch.num_generations)}"
    if not bound:
        why = " (--max_staleness 0)" if config.async_generate else ""
        return Section("Rollouts", [("mode", f"synchronous: sample, then train{why}"), ("in flight", each)])
    versions = f"at most {bound} weight version{'s' if bound > 1 else ''} from sampling to training"
    ahead = f"at most {each} in flight or waiting to be trained on"
    if take_turns(config, groups):
        mode = f"asynchronous in bursts of {bound + 1} generations: engines and policy take turns on GPUs"
        return Section("Rollouts", [("mode", mode), ("staleness", versions), ("ahead", ahead)])
    return Section(
        "Rollouts",
        [
            ("mode", "asynchronous: sampling goes on while the policy trains"),
            ("staleness", versions),
            ("ahead", ahead),
            ("when weights arrive", f"half-written completions {IN_FLIGHT[config.rollout_in_flight]}"),
        ],
    )
