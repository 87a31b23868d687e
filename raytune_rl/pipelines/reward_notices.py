"""Notices on rewards that fail: each way to fail once, by name; how often is in the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from raytune_rl.protocol.rewards import RewardTable


class RewardNotices:
    """Tells each kind of failure of each function the first time that it is seen.

    Args:
        say: Tells the user a sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._told: set[tuple[str, str]] = set()

    def tell(self, scored: RewardTable) -> None:
        """Says what is new in the rewards of a batch."""
        counts = Counter((failure.function, failure.kind) for failure in scored.failures)
        for failure in scored.failures:
            name, kind, count = failure.function, failure.kind, counts[failure.function, failure.kind]
            self._once(
                (name, kind),
                f"Note: reward `{name}`: {count} of {len(scored.values)} completions have none ({kind}): "
                f"{failure.message}. They are left out of their groups; further ones are only counted "
                "(reward_failures).",
            )
        for name, why in scored.one_by_one.items():
            self._once(
                (name, "one by one"),
                f"Note: reward `{name}` failed on a whole batch ({why}) and was called for each completion "
                "alone: what it compares within a batch it cannot have compared.",
            )

    def _once(self, key: tuple[str, str], sentence: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._say(sentence)
