"""What an online run reads before anything is started: prompts, and the answers that it learns beside."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_rl.config import RLHFConfig
from raytune_rl.config.batching import GRPOSchedule, grpo_schedule_of
from raytune_rl.groups import specs
from raytune_rl.groups.teachers import longest_seen
from raytune_rl.multi_turn.scheduler import make_scheduler
from raytune_rl.pipelines.demonstrations import Demonstrations, demonstrations_of
from raytune_rl.pipelines.experts import Experts, experts_of
from raytune_rl.pipelines.lifecycle import ResumePoint, stage
from raytune_rl.pipelines.online_algorithms import Algorithm
from raytune_rl.pipelines.position import generations_go_on
from raytune_rl.prepare.sets import check_lengths, prompt_sets
from raytune_rl.protocol.data import PromptSet
from raytune_rl.rewards.judge import plugin_class
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.rewards.preflight import RewardNeeds, preflight
from raytune_rl.rewards.sandbox import memory_limit_bytes


@dataclass(frozen=True)
class OnlineData:
    """The data of a run, and how its steps are cut from them.

    Attributes:
        train: What to sample from.
        held_out: What to evaluate on, or None.
        schedule: Steps and batches.
        max_model_len: Tokens that prompt and completion may have together.
        demonstrations: Answers of the data that some generations consist of; None without any.
        experts: Answers of other data that steps learn beside; None without any.
        notices: Sentences for the user.
    """

    train: PromptSet
    held_out: PromptSet | None
    schedule: GRPOSchedule
    max_model_len: int
    demonstrations: Demonstrations | None = None
    experts: Experts | None = None
    notices: tuple[str, ...] = ()

    @property
    def sets(self) -> list[PromptSet]:
        """All prompts that are sampled from."""
        return [self.train] if self.held_out is None else [self.train, self.held_out]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return longest_of(self.train, self.held_out)

    @property
    def longest_taught(self) -> int:
        """Tokens of the longest row that teachers may see."""
        answers = None if self.demonstrations is None else self.demonstrations.rows
        return longest_seen(self.train, self.max_model_len, answers)


def rewards_checked(config: RLHFConfig) -> RewardNeeds:
    """What the reward functions ask of the rows; they and the other plugins are loaded as the workers will,
    so a wrong name ends the run before anything is started.

    Raises:
        RewardError: A name is unknown, or a file of `--external_plugins` cannot be loaded.
    """
    with stage("loading the reward functions"):
        if config.multi_turn_scheduler is not None or config.reward_model_plugin:
            load_plugins(config.external_plugins)
        if config.multi_turn_scheduler is not None:
            make_scheduler(config.multi_turn_scheduler, config.max_turns)
        for name in config.reward_model_plugin:
            plugin_class(name)
        byte_limit = memory_limit_bytes(config.reward_memory_limit)
        return preflight(config.reward_funcs, config.external_plugins, config.args(), byte_limit)


def read_data(
    config: RLHFConfig,
    algorithm: Algorithm,
    policy_ranks: int,
    rewards: RewardNeeds,
    resume_point: ResumePoint,
    *,
    one_machine: bool,
) -> OnlineData:
    """Reads and tokenizes all that the run samples from and learns beside.

    Args:
        config: Of the run.
        algorithm: Loss and credit.
        policy_ranks: Ranks of the policy, which share a step.
        rewards: What the reward functions ask of the rows.
        resume_point: Where the run goes on.
        one_machine: Whether the cluster is this machine alone.

    Raises:
        DataError: A row, or all of them.
        ConfigError: A step or a sequence that does not come out.
    """
    quarantine = resume_point.run_dir.quarantine_jsonl
    with stage("reading and tokenizing the data") as tell:
        train, held_out = prompt_sets(config, quarantine, one_machine=one_machine, tell=tell)
    account = train.account
    rewards.check([*account.columns, *(f"{modality}s" for modality in account.media.modalities)])
    specs.check_readable(config, account.media)
    schedule = grpo_schedule_of(config, policy_ranks, len(train))
    demonstrations = experts = None
    if config.demonstrates:
        rows = schedule.batch.prompts_per_generation * schedule.batch.num_generations
        kept_out = quarantine.with_name("quarantine.answers.jsonl")
        with stage("reading the answers of the data") as tell:
            demonstrations = demonstrations_of(config, rows, kept_out, one_machine=one_machine, tell=tell)
    if algorithm.expert_share is not None:
        kept_out = quarantine.with_name("quarantine.expert.jsonl")
        with stage("reading the expert's answers") as tell:
            experts = experts_of(
                config, schedule.batch, algorithm.expert_share, kept_out, one_machine=one_machine, tell=tell
            )
    schedule, resized = generations_go_on(schedule, len(train), resume_point, config.max_steps)
    longest, limit = longest_of(train, held_out), config.vllm_max_model_len
    max_model_len = check_lengths(longest, config.max_completion_length, limit, account.max_positions)
    notices = (*resized, *account.notices)
    return OnlineData(train, held_out, schedule, max_model_len, demonstrations, experts, notices)


def longest_of(*sets: PromptSet | None) -> int:
    """Tokens of the longest prompt of all sets."""
    return max(int(prompts.lengths.max()) for prompts in sets if prompts is not None)
