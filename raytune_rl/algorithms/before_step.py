"""What a loss of online RL works out of its whole optimizer step before it is made.

A loss sees one micro-batch; what depends on all rows of the step (a group's other completions, a share of all
tokens) comes to it as values of its rows, or as a column. So it is the same whatever the number of ranks and
micro-batches. The driver moves numbers of rows and references; tokens stay with the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from raytune_rl.protocol.train import TokenOrder


@dataclass(frozen=True)
class OnlineStep:
    """An optimizer step, as the driver knows it.

    Attributes:
        number: Of the step, from 0.
        seed: Of the run.
        groups: The group of each row, int64 `[n]`.
        advantages: Of each row, float64 `[n]`.
        lengths: Tokens of each row that are trained on, int64 `[n]`; 0 for one that is left out.
    """

    number: int
    seed: int
    groups: NDArray[np.int64]
    advantages: NDArray[np.float64]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.groups)


class StepModels(Protocol):
    """The policy under the weights that the step starts from, as a loss may ask it about the step's rows."""

    def log_ratios(self) -> NDArray[np.float64]:
        """log pi - log pi_old, summed over each row's tokens, float64 `[n]`; 0 where the step is the first
        after the sampling."""
        ...

    def logprobs(self) -> NDArray[np.float64]:
        """log pi, summed over each row's tokens, float64 `[n]`."""
        ...

    def first_tokens(self, order: TokenOrder, count: int) -> Any:
        """Which tokens are the first `count` in an order, over all rows with trained tokens: of each row a
        column of 1 and 0."""
        ...


@dataclass(frozen=True)
class StepValues:
    """What the loss will find.

    Attributes:
        row_values: By name, float64 `[n]`.
        columns: By name, as `StepModels` gave them.
    """

    row_values: Mapping[str, ArrayLike] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BeforeStep:
    """What a loss does before a step.

    Attributes:
        prepare: (the loss's settings, the step, whom to ask) -> values.
        gives: Names of those values.
    """

    prepare: Callable[[Any, OnlineStep, StepModels], StepValues]
    gives: frozenset[str]
