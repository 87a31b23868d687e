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
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from raytune_rl.runtime.cluster import NAMESPACE
from raytune_rl.runtime.weights import find_manifest, read

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
    """Loads a version's buckets with vLLM's layer-wise reload, which also redoes kernel-specific packing."""

    init_info_cls = StoreInitInfo
    update_info_cls = StoreUpdateInfo

    def init_transfer_engine(self, init_info: StoreInitInfo) -> None:
        """Joins the cluster if this process has not, as in a tensor-parallel worker of its own."""
        self._source = init_info
        if not ray.is_initialized():
            ray.init(address=os.environ[ADDRESS_VARIABLE], namespace=NAMESPACE, log_to_driver=False)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(
        self, update_info: StoreUpdateInfo, load_weights: Callable[..., Any] | None = None
    ) -> None:
        """Pulls the version and loads it. vLLM up to 0.24 reloads layer-wise by itself and says how to
        load.
        """
        manifest = find_manifest(self._source.store, update_info.version, self._source.timeout_s)
        load = self.model.load_weights if load_weights is None else load_weights
        load(read(manifest, self._source.timeout_s))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_embeddings(self.model)

    def shutdown(self) -> None:
        """Nothing is held: no process group, no connection."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM up to 0.24 wants a sender beside the receiver; here the policy publishes to the store
        instead.
        """
        raise NotImplementedError("weights are published to the weight store, not sent")


def repack_embeddings(model: torch.nn.Module) -> None:
    """Renews the CPU kernels' packed copy of every embedding and language-model head.

    On a CPU the head multiplies with a packed copy made when the weights were loaded. A head tied to the
    embedding
    shares its weight but keeps a packed copy of its own, which a reload of the embedding does not renew:
    without this the engine would go on sampling from the old head.
    """
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
