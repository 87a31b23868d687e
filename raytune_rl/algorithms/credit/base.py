"""Credit: from the rewards of a generation to advantages. The one place where algorithms of online RL differ
beside their losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from raytune_rl.algorithms.registry import import_package
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raytune_rl.algorithms.distillation import Advice
    from raytune_rl.algorithms.experience import Experience
    from raytune_rl.protocol.rows import RowPointer, TrainBatch
    from raytune_rl.protocol.train import Estimates, EstimateSettings


class Models(Protocol):
    """The models of the run, as a credit may ask them. Token arrays stay with the workers."""

    def row_kl(self, batch: TrainBatch, estimator: str) -> NDArray[np.float64]:
        """KL to the reference of each row, summed over its tokens, float64 `[n]`, nats; the batch has the
        column "ref_logprobs". Log-probs of the policy are taken where it has no "old_logprobs"."""
        ...

    def token_baseline(
        self, batch: TrainBatch, rewards: NDArray[np.float64], groups: Sequence[int]
    ) -> tuple[list[RowPointer], NDArray[np.float64]]:
        """Where each row's advantages by `otb.otb_advantages` lie, and the mean of them, float64 `[n]`."""
        ...

    def estimate(
        self,
        batch: TrainBatch,
        scores: NDArray[np.float64],
        settings: EstimateSettings,
        *,
        whiten_rewards: bool,
    ) -> Estimates:
        """The critic's advantages and returns; see `groups.critic.CriticGroup.estimate`."""
        ...


@dataclass(frozen=True)
class Credited:
    """A batch whose rows know what they earned.

    Attributes:
        batch: As the loss shall have it: what only the credit needed is gone, what it made is there. A column
            "advantages" has one a token.
        advantages: Of each row, float32 `[n]`: what every token of it earned, or the mean of them.
        metrics: For the log.
    """

    batch: TrainBatch
    advantages: NDArray[np.float32]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Credit(ABC):
    """Says what each completion, or each of its tokens, earned. A subclass is a frozen dataclass whose
    fields are settings by the names of their flags.
    """

    no_signal: ClassVar[str] = "in no group do two completions have different rewards"
    """The reason why there is nothing to learn."""
    wants_greedy: ClassVar[bool] = False
    """Whether the likeliest answer to each prompt is sampled and scored too: `Experience.greedy`."""

    @property
    def needs(self) -> frozenset[str]:
        """Columns that the batch must have: "ref_logprobs", "old_logprobs"; and "values" for a critic. The
        pipeline starts the groups that give them."""
        return frozenset()

    @abstractmethod
    def assign(self, experience: Experience, batch: TrainBatch, models: Models) -> Credited:
        """Advantages for the rows of the batch.

        Args:
            experience: Trajectories and rewards, row by row as in the batch.
            batch: Where the rows lie, with the columns that are needed.
            models: Whom to ask.
        """

    def advice(self, step: int) -> Advice | None:
        """How teachers' opinions change what tokens have earned, at an optimizer step from 0; None: by
        --teacher_kl_coef times the reverse KL."""
        return None

    def informative(self, experience: Experience) -> set[int]:
        """Groups that teach anything: dynamic sampling replaces the others."""
        return experience.informative()

    def has_signal(self, experience: Experience) -> bool:
        """Whether there is anything to learn from a generation."""
        return bool(self.informative(experience))

    def in_words(self) -> str:
        """For the plan."""
        return type(self).__name__


@dataclass(frozen=True)
class CreditKind:
    """A registered credit.

    Attributes:
        name: Value of `--advantage_estimator`.
        make: Its class.
        summary: What it does, for `--help`.
        paper: Where it comes from.
        fixed: Settings of the class that this name stands for.
        kl_in_reward: Whether the KL belongs into the reward unless the user says otherwise.
        compares: Whether completions of a prompt are compared with each other, so that one is not enough.
    """

    name: str
    make: type[Credit]
    summary: str
    paper: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    kl_in_reward: bool = False
    compares: bool = True

    @property
    def is_built_in(self) -> bool:
        """Whether it comes with this package, not from a plugin."""
        return self.make.__module__.startswith("raytune_rl.")

    def settings(self, given: Mapping[str, Any]) -> Credit:
        """The credit with those of the settings given that it has.

        Raises:
            ConfigError: It does not take them.
        """
        own = {one.name for one in fields(self.make)}
        arguments = {**{name: value for name, value in given.items() if name in own}, **self.fixed}
        try:
            return self.make(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"--advantage_estimator {self.name} cannot be set up with {arguments}: {error}."
            ) from None


_CREDITS: dict[str, CreditKind] = {}


def register_credit(kind: CreditKind) -> CreditKind:
    """Makes a credit available by name. A plugin file that is loaded again replaces its own.

    Raises:
        ConfigError: The name is taken by another class.
    """
    known = _CREDITS.get(kind.name)
    if known is not None and _origin(known) != _origin(kind):
        raise ConfigError(f"a credit named '{kind.name}' is already registered")
    _CREDITS[kind.name] = kind
    return kind


def _origin(kind: CreditKind) -> tuple[str, str]:
    return kind.make.__module__, kind.make.__qualname__


def get_credit(name: str) -> CreditKind:
    """The credit of that name.

    Raises:
        ConfigError: There is none; the message lists those that exist.
    """
    names = credit_names()
    if name not in _CREDITS:
        raise ConfigError(
            f"--advantage_estimator {name} is not one of: {', '.join(names)}. One of your own comes from a "
            f"file given "
            "to --external_plugins, which calls register_credit."
        )
    return _CREDITS[name]


def credit_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    _load_built_in()
    return tuple(sorted(_CREDITS))


def is_built_in_credit(name: str) -> bool:
    """Whether a credit of that name comes with this package."""
    return name in credit_names() and _CREDITS[name].is_built_in


@cache
def _load_built_in() -> None:
    import_package("raytune_rl.algorithms.credit")
