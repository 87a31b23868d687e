"""A rank's part in publishing the policy's weights: which tensors it gives, and what they are now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.runtime.weights import plan_buckets, to_arrays

if TYPE_CHECKING:
    from raytune_rl.models.weights import Gather, WeightExporter


UNTIED = (
    "the adapter changes the head or the embedding of a model that ties them (tie_word_embeddings), so they "
    "are two matrices now, but the engines have one. Leave them out of --target_modules and "
    "--modules_to_save; or merge an adapter of --adapters first, which writes a model that does not tie "
    "them: raytune-rl export --adapters ADAPTER --merge_lora true --output_dir MERGED; then --model MERGED"
)


class Publisher:
    """Gives this rank's share of the published weights, bucket by bucket.

    Args:
        exporter: Makes the tensors.
        gather: Makes them whole where the engine cuts them up: then publishing is a collective.
        rank, world_size: The share.
    """

    def __init__(self, exporter: WeightExporter, gather: Gather, rank: int, world_size: int) -> None:
        self._exporter = exporter
        self._gather = gather
        self._rank = rank
        self._world_size = world_size

    def index(self) -> tuple[tuple[TensorEntry, ...], ...]:
        """The buckets this rank publishes: each a tuple of entries. Ranks share the work bucket by bucket."""
        entries = list(self._exporter.index)
        # As `parameter_groups` has them, and so DeepSpeed in its flat buffers: neighbours travel together.
        entries.sort(key=lambda entry: len(entry.shape) < 2)
        buckets = plan_buckets(entries)
        self._share = [[entries[i] for i in bucket] for bucket in buckets[self._rank :: self._world_size]]
        return tuple(tuple(bucket) for bucket in self._share)

    def publish(self) -> tuple[Any, ...]:
        """The present weights: how many buckets, then each bucket of `index` as a list of flat uint8
        arrays.
        """
        own_names = {entry.name for bucket in self._share for entry in bucket}
        # At once, because a sharded tensor is whole only here, and merged ones would fill a GPU.
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self._exporter.tensors(own_names, self._gather)
        }
        wrong = [e for bucket in self._share for e in bucket if TensorEntry.of(e.name, tensors[e.name]) != e]
        if wrong:
            raise RuntimeError(f"weight {wrong[0].name} changed its shape or type since the index was made")
        return len(self._share), *(
            to_arrays(tensors[entry.name] for entry in bucket) for bucket in self._share
        )


def adapter_config(model: Any) -> str:
    """The PEFT configuration of a model's adapter as JSON text, as in adapter_config.json."""
    from raytune_rl.models.unwrap import peft_model

    peft = peft_model(model)
    assert peft is not None
    config = peft.peft_config[str(peft.active_adapters[0])].to_dict()
    return json.dumps(config, default=_jsonable)


def _jsonable(value: Any) -> Any:
    """PEFT's configuration holds sets and enums."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
