"""Do the reward functions exist, load, and find their columns? Asked before anything is started."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_rl.errors import RewardError
from raytune_rl.protocol.rewards import RUN_COLUMNS, missing_columns
from raytune_rl.rewards.sandbox import Sandbox


@dataclass(frozen=True)
class RewardNeeds:
    """The needs of reward functions.

    Attributes:
        names: Of the functions.
        required: Columns that each must have.
    """

    names: tuple[str, ...]
    required: tuple[tuple[str, ...], ...]

    def check(self, columns: Collection[str]) -> None:
        """Compares with the columns of the data.

        Raises:
            RewardError: One is missing, or has a name under which rewards receive the run's own values.
        """
        if clash := sorted(set(columns) & set(RUN_COLUMNS)):
            raise RewardError(
                f"Data set columns have names under which reward functions receive the run's own values: "
                f"{', '.join(clash)}. Rename them with --columns."
            )
        for name, required in zip(self.names, self.required, strict=True):
            missing = missing_columns(required, {*columns, *RUN_COLUMNS})
            if missing:
                plural = "s" if len(missing) > 1 else ""
                raise RewardError(
                    f"Reward `{name}` needs the column{plural} {', '.join(missing)}; "
                    f"the data has: {', '.join(sorted(columns)) or 'none besides the prompt'}. Rename one "
                    'with --columns \'{"name in the file": "' + missing[0].partition(" or ")[0] + "\"}'."
                )


def preflight(
    names: Sequence[str],
    plugin_files: Sequence[str],
    config: dict[str, Any],
    memory_limit_bytes: int | None = None,
) -> RewardNeeds:
    """Loads plugins and builds the functions in a child process, as the reward workers will.

    Raises:
        RewardError: A name is unknown, a plugin cannot be loaded, or a function cannot be made.
    """
    sandbox = Sandbox(names, plugin_files, config, timeout_s=1.0, memory_limit_bytes=memory_limit_bytes)
    try:
        return RewardNeeds(sandbox.names, sandbox.required)
    finally:
        sandbox.close()
