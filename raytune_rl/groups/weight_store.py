"""The weight store as the pipelines see it."""

from __future__ import annotations

from typing import Any

from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.wait import Pending, fetch


class WeightStore:
    """Where published versions are found by whoever wants to load one.

    Args:
        actor: The store's actor (`runtime.weights`).
        timeout_s: Deadline of a call, seconds.
    """

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    def publish(self, manifest: Manifest) -> None:
        """Makes a version the newest."""
        call = self._actor.publish.remote(manifest)
        fetch(Pending(call, "the weight store", "publishing", self._timeout_s))
