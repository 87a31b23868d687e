"""Requests for rewards and their results, between driver, reward workers and their child processes.

numpy is imported for the type checker alone: the children import this module and should start fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from raytune_rl.errors import RewardError
from raytune_rl.protocol.model import ModelSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN_COLUMNS = (
    "prompt_id", "request_id", "finish_reason", "is_truncated", "completion_tokens", "trainer_state",
    "num_turns", "rollout_infos", "response_token_ids",
)  # fmt: skip
"""The columns that reward functions receive beside the data set's: names of ms-swift, and
`completion_tokens`. `response_token_ids` are the tokens that the model sampled, of all its turns. Rows with
media have `images`, `videos` and `audios` too, see `workers.reward`."""

FailureKind = Literal["exception", "timeout", "crash", "invalid"]


@dataclass(frozen=True)
class Unscored:
    """The value that a reward function returns in place of a number for a sample that it could not score.

    `None` says "this reward does not apply here"; `Unscored` says "it should have, and this is why it did
    not".
    """

    message: str
    kind: FailureKind = "invalid"


@dataclass(frozen=True)
class Failure:
    """One sample that one function could not score; its value is NaN.

    Attributes:
        row: Row of the scored batch.
        function: Registry name of the reward function.
        kind: `exception` it raised, `timeout` it took too long, `crash` its process died, `invalid` what it
            returned is no finite number.
        message: The reason, for a person.
    """

    row: int
    function: str
    kind: FailureKind
    message: str


def failed_entries(
    failures: Sequence[Failure], rows: int, names: Sequence[str], labels: Sequence[str]
) -> NDArray[np.bool_]:
    """Where a function failed, bool `[rows, functions]`; functions go by their name or their label."""
    import numpy as np

    failed = np.zeros((rows, len(names)), dtype=np.bool_)
    for failure in failures:
        for column, known_as in enumerate(zip(names, labels, strict=True)):
            failed[failure.row, column] |= failure.function in known_as
    return failed


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch.

    Attributes:
        functions: Registry names, in the order of `--reward_funcs`.
        labels: Class or function names, as ms-swift's metric keys have them (`rewards/<label>/mean`).
        values: float64 `[n, len(functions)]`; NaN where a function returned `None` or failed.
        failures: One entry for each failed sample and function. A `None` is not a failure.
        seconds: Wall seconds spent in each function, slow path included.
        slow_path: For each function, why the call with the whole batch did not serve and the samples were
            tried one by one; `None` where it did serve.
    """

    functions: tuple[str, ...]
    labels: tuple[str, ...]
    values: NDArray[np.float64]
    failures: tuple[Failure, ...]
    seconds: tuple[float, ...]
    slow_path: tuple[str | None, ...]

    def failure_counts(self) -> Counter[tuple[str, FailureKind]]:
        """Number of failed samples by (function, kind)."""
        return Counter((failure.function, failure.kind) for failure in self.failures)


@dataclass(frozen=True)
class TrainerState:
    """The progress of the run, as ms-swift's reward functions read it from `trainer_state`."""

    global_step: int
    max_steps: int


@dataclass(frozen=True)
class RewardBatch:
    """A request for rewards: completions, and what the reward functions get beside them.

    Attributes:
        texts: The completions.
        columns: A list is a column and has one entry a completion; anything else, such as a `TrainerState`,
            is one value for the whole batch.

    Raises:
        RewardError: A column has another length than `texts`, or is called `completions`.
    """

    texts: list[str]
    columns: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "completions" in self.columns:
            raise RewardError(
                "A column is called `completions`, the name under which reward functions receive the "
                "generated texts. Rename the column (for instance with --columns)."
            )
        for name, column in self.columns.items():
            if isinstance(column, list) and len(column) != len(self.texts):
                raise RewardError(
                    f"Column `{name}` has {len(column)} entries for {len(self.texts)} completions."
                )

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> RewardBatch:
        """The given rows, in the given order."""
        return RewardBatch([self.texts[row] for row in rows], take_rows(self.columns, rows))


def missing_columns(required: Sequence[str], there: Container[str]) -> list[str]:
    """Those of `required` that are not there; "a or b" is met by either."""
    return [name for name in required if not any(one in there for one in name.split(" or "))]


def take_rows(columns: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The given rows of each column; values that are no lists stay as they are."""
    return {
        name: [column[row] for row in rows] if isinstance(column, list) else column
        for name, column in columns.items()
    }


def with_completions(conversations: Sequence[list[Any]], texts: Sequence[str]) -> list[list[Any]]:
    """Conversations as ms-swift's rewards see them in `messages`: the completion is the last turn."""
    return [
        [*turns, {"role": "assistant", "content": text}]
        for turns, text in zip(conversations, texts, strict=True)
    ]


@dataclass(frozen=True)
class RewardTable:
    """The rewards of a batch of trajectories.

    Attributes:
        labels: Class names of the reward functions, as in ms-swift's metric names.
        names: Registry names.
        values: float64 `[n, functions]`, NaN where there is none.
        failures: Samples that a function could not score, with the reason.
        one_by_one: Functions that could not be called with a whole batch -> why.
    """

    labels: tuple[str, ...]
    names: tuple[str, ...]
    values: NDArray[np.float64]
    failures: tuple[Failure, ...]
    one_by_one: Mapping[str, str] = field(default_factory=dict)

    def failed(self) -> NDArray[np.bool_]:
        """Where a function failed, bool `[n, functions]`."""
        return failed_entries(self.failures, len(self.values), self.names, self.labels)


@dataclass(frozen=True)
class RewardModelSpec:
    """Which reward models a worker holds.

    Attributes:
        models: What to load; a path may be the directory of an adapter, whose base is loaded with it.
        labels: A name for each, for metrics.
        max_tokens: Token budget of a pass.
        timeout_s: Deadline for reading texts from the object store, seconds.
        plugins: How each model is asked, by registered name; empty: as "default".
        plugin_files: Files that may register further ones.
    """

    models: tuple[ModelSpec, ...]
    labels: tuple[str, ...]
    max_tokens: int
    timeout_s: float
    plugins: tuple[str, ...] = ()
    plugin_files: tuple[str, ...] = ()
