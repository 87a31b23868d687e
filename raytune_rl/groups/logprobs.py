"""The reference as the online pipeline sees it: log-probs for the KL, by any number of copies or by the
policy itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from raytune_rl.groups.trainer import PolicyGroup, score_rows
from raytune_rl.protocol.rows import RowPointer
from raytune_rl.protocol.train import RowLogprobs
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.group import WorkerGroup
from raytune_rl.runtime.wait import fetch_all


class Reference(Protocol):
    """Gives log-probs of rows under the model that the KL refers to."""

    def logprobs(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
    ) -> RowLogprobs:
        """Log-probs of every row; `late` as in `score_rows`."""
        ...


class AdapterOff:
    """The policy's own model without its LoRA adapter, which is what it started from: no second copy.

    Args:
        policy: Whose adapter was new when the run began.
    """

    def __init__(self, policy: PolicyGroup) -> None:
        self._policy = policy

    def logprobs(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
    ) -> RowLogprobs:
        """Log-probs of every row; `late` as in `score_rows`."""
        return self._policy.logprobs(rows, lengths, late, without_adapter=True)


class ReferenceGroup:
    """M copies that answer as one.

    Args:
        group: The started workers.
        max_tokens: Token budget of a micro-batch.
        layout: "padded" or "packed".
    """

    def __init__(self, group: WorkerGroup, max_tokens: int, layout: str) -> None:
        self._group = group
        self._max_tokens = max_tokens
        self._layout = layout

    def logprobs(
        self,
        rows: Sequence[RowPointer],
        lengths: Sequence[int],
        late: Mapping[str, Sequence[RowPointer]] | None = None,
    ) -> RowLogprobs:
        """Log-probs of every row; `late` as in `score_rows`."""
        return score_rows(self._group, rows, lengths, self._max_tokens, self._layout, late=late)

    def mix(self, manifest: Manifest, share: float) -> None:
        """Every copy moves its weights towards those of a published version."""
        self._group.call("mix", manifest, share, what="mixing the policy into the reference")

    def save(self, directory: Path) -> None:
        """Writes the weights of one copy: all are the same."""
        fetch_all([self._group.submit(0, "save", str(directory), what="saving the reference")])

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, in every copy."""
        self._group.call("load", str(directory), what="restoring the reference")
