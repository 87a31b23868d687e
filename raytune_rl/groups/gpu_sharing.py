"""Whose turn it is on GPUs that policy and rollout share: who waits gives its memory back.

Where each group has its own GPUs, and on a CPU, nobody ever has to move and every call here does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raytune_rl.config import RLHFConfig
from raytune_rl.groups import specs
from raytune_rl.groups.fleet import RolloutFleet
from raytune_rl.groups.learners import Learners
from raytune_rl.groups.rewards import RewardModelGroup
from raytune_rl.groups.sizes import Groups


class Frozen(Protocol):
    """Models that are only asked."""

    def offload(self, weights: bool) -> None:
        """Gives back what the allocators keep, and moves the weights to the CPU if they are wanted away."""
        ...

    def reload(self) -> None:
        """Brings them back."""
        ...


def take_turns(config: RLHFConfig, groups: Groups) -> bool:
    """Whether engines cannot sample while the policy trains: they give each other's memory back."""
    shared = groups.on_gpu and groups.colocated
    return shared and (
        specs.sleep_level(config, groups) > 0 or config.offload_model or config.offload_optimizer
    )


class GPUSharing:
    """Moves weights and caches in the one order that never holds both in full.

    Args:
        config: `sleep_level`, `offload_model` and `offload_optimizer` say what is moved.
        groups: Whether there is anything to share.
        learners: Hold the GPUs at first.
        rollout: Sleeps at first where it ever does: `groups.start_order` sees to that.
        frozen: A reference model of its own and teachers; they move as the policy's weights do.
        judges: Reward models, which score while the engines are awake, and so stay.
    """

    def __init__(
        self,
        config: RLHFConfig,
        groups: Groups,
        learners: Learners,
        rollout: RolloutFleet,
        frozen: Sequence[Frozen] = (),
        judges: RewardModelGroup | None = None,
    ) -> None:
        shared = groups.on_gpu and groups.colocated
        self._sleeps = shared and specs.sleep_level(config, groups) > 0
        self._weights = shared and config.offload_model
        self._optimizer = shared and config.offload_optimizer
        self._learners, self._rollout = learners, rollout
        self._frozen, self._judges = frozen, judges
        self._awake, self._offloaded = not self._sleeps, False

    @property
    def takes_turns(self) -> bool:
        """Whether engines cannot sample while the policy trains."""
        return self._sleeps or self._weights or self._optimizer

    def to_policy(self) -> None:
        """The policy is about to train, publish or be saved."""
        if self._sleeps and self._awake:
            self._rollout.sleep()
            self._awake = False
        if self._offloaded:
            self._learners.reload()
            if self._weights:
                for group in self._frozen:
                    group.reload()
            self._offloaded = False

    def to_rollout(self) -> bool:
        """The engines are about to sample. True if they woke up, and so must pull their weights first."""
        # Also with nothing to move: what the others' allocators keep is not free for an engine.
        if self.takes_turns and not self._offloaded:
            self._learners.offload(self._weights, self._optimizer)
            for group in self._frozen:
                group.offload(self._weights)
            self._offloaded = True
        if self._sleeps and not self._awake and self._judges is not None:
            self._judges.empty_cache()
        if self._awake:
            return False
        self._rollout.wake()
        self._awake = True
        return True
