"""Every failure has a name.

A `RaytuneError` is written for the person who can mend it: what was wrong, where, and what to do. The command
line prints its message without a traceback; anything else that escapes is a defect of raytune_rl and keeps
its traceback.
"""

from __future__ import annotations

from pathlib import Path


class RaytuneError(Exception):
    """Base of all errors raytune_rl raises on purpose. Its text holds no secret: see `redact_text`."""

    def __str__(self) -> str:
        from raytune_rl.redaction import redact_text

        return redact_text(super().__str__())


class ConfigError(RaytuneError):
    """A flag, a config file or a combination of them cannot be honoured."""


class DataError(RaytuneError):
    """A row or a source of data cannot be used; the message names the file and the line."""


class ModelError(RaytuneError):
    """A model, tokenizer or adapter cannot be loaded or does not fit the request."""


class RewardError(RaytuneError):
    """A reward function cannot be found, loaded or called at all (a failing *sample* is counted, not
    raised).
    """


class CheckpointError(RaytuneError):
    """A checkpoint is missing, incomplete, or does not belong to this run."""


class RunInUseError(RaytuneError):
    """Another command that lives writes into the run's directory."""


class PlacementError(RaytuneError):
    """The groups do not fit on the cluster; the message shows what was asked and what each node has."""


class DeadlineExceededError(RaytuneError):
    """A wait ran out of time; the message says who was waited for, for what, and how long."""


class WorkerDiedError(RaytuneError):
    """An actor ended while its answer was awaited."""


class WorkerHungError(WorkerDiedError):
    """An actor gives no sign of life, or a group of them makes no progress: taken for dead.

    Attributes:
        rank: Of the actor in its group; None: all of them.
    """

    rank: int | None = None


class RestartsUsedUpError(WorkerDiedError):
    """Workers were lost more often than they may be; the message lists when, who and at what."""


class SnapshotMissingError(WorkerDiedError):
    """A rank of a world was lost that no snapshot of it outlives."""


class NodeLostError(RaytuneError):
    """A node that held workers, or the cluster's head, is gone.

    Attributes:
        survivable: Whether other nodes are left to go on with.
        rescued: What a run can begin again from that lost it, newer than its checkpoints; None: nothing.
    """

    survivable = True
    rescued: Path | None = None


class WorkerFailedError(RaytuneError):
    """A call inside an actor raised; the message carries the worker's own error."""


class StaleWeightsError(RaytuneError):
    """A worker was asked to serve under a weight version that it has not loaded."""


class EngineMismatchError(RaytuneError):
    """A rollout engine's log-probs are not the policy's, though both should hold the same weights."""
