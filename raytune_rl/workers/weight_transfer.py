"""Weights from the object store into vLLM, through vLLM's own weight-transfer interface.

vLLM calls this engine in each of its workers; each pulls its own copy by the version's number, so it makes no
difference whether the worker lives in the rollout actor's process (tensor parallel 1) or in another (more).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from raytune_rl.runtime.cluster import NAMESPACE
from raytune_rl.runtime.weights import find_manifest, read
from raytune_rl.workers.vllm_reload import Reload

ADDRESS_VARIABLE = "RAYTUNE_RL_RAY_ADDRESS"


@dataclass
class StoreInitInfo(WeightTransferInitInfo):
    """Where to pull from: the weight store's actor name and the deadline of a pull, seconds."""

    store: str
    timeout_s: float


@dataclass
class StoreUpdateInfo(WeightTransferUpdateInfo):
    """Which version to pull."""

    version: int


class ObjectStoreEngine(WeightTransferEngine[StoreInitInfo, StoreUpdateInfo]):
    """Loads a version's buckets into the running model (`vllm_reload`)."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """Joins the cluster if this process has not, as in a tensor-parallel worker of its own."""
        self._source = init_info
        self._reload: Reload | None = None
        if not ray.is_initialized():
            ray.init(address=os.environ[ADDRESS_VARIABLE], namespace=NAMESPACE, log_to_driver=False)

    def start_weight_update(self) -> None:
        if self._reload is None:
            self._reload = Reload(self.model, self.model_config)
        self._reload.start()

    def receive_weights(
        self, update_info: StoreUpdateInfo, load_weights: Callable[..., Any] | None = None
    ) -> None:
        """Pulls the version and loads it. vLLM up to 0.24 reloads layer-wise by itself and says how to
        load.
        """
        manifest = find_manifest(self._source.store, update_info.version, self._source.timeout_s)
        assert self._reload is not None
        self._reload.load(lambda: read(manifest, self._source.timeout_s), load_weights)

    def finish_weight_update(self) -> None:
        assert self._reload is not None
        self._reload.finish()

    def shutdown(self) -> None:
        """Nothing is held: no process group, no connection."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM up to 0.24 wants a sender beside the receiver; here the policy publishes to the store
        instead.
        """
        raise NotImplementedError("weights are published to the weight store, not sent")
