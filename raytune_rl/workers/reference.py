"""The reference worker: log-probs under the model that the KL term refers to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytune_rl.errors import CheckpointError, ModelError
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Settled
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.weights import from_bytes, read, to_bytes
from raytune_rl.workers.frozen import FrozenModel
from raytune_rl.workers.saving import writing


class ReferenceWorker:
    """A copy of the model training started from, its starting adapters included.

    Frozen, and so without a state of its own, unless it is told to `mix` (Gorbatovski et al. 2024, "Learn
    your reference model for real good alignment").
    """

    def __init__(self, spec: ModelSpec, settings: ScoreSettings) -> None:
        self._model = FrozenModel(spec, settings)

    def ping(self) -> Settled:
        """Proves that the model is loaded; how its rows are laid out."""
        return self._model.settled

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return self._model.logprobs(batch)

    def offload(self, weights: bool) -> None:
        """Moves its weights to the CPU if they are wanted away, and gives back what the allocator keeps."""
        self._model.offload(weights)

    def reload(self) -> None:
        """Brings back what `offload` moved."""
        self._model.reload()

    def mix(self, manifest: Manifest, share: float) -> None:
        """Moves every weight towards a published version: ref <- share * policy + (1 - share) * ref.

        Raises:
            ModelError: The model is published in another shape than it has in memory.
        """
        import torch

        from raytune_rl.models.weights import export_tensors

        own = dict(export_tensors(self._model.scorer, "full"))
        in_place = {p.data_ptr() for p in self._model.scorer.parameters()}
        with torch.no_grad():
            for name, published in read(manifest, self._model.settings.timeout_s):
                own_tensor = own.pop(name, None)
                if own_tensor is None or own_tensor.data_ptr() not in in_place:
                    raise ModelError(
                        f"--sync_ref_model: {name} has another form in memory; it cannot be mixed"
                    )
                own_tensor.lerp_(published.to(own_tensor), share)
        self._model.changed()
        if own:
            raise ModelError(f"--sync_ref_model: the policy does not publish {sorted(own)[0]}")

    def weights(self) -> tuple[int, dict[str, NDArray[np.uint8]]]:
        """All weights, for `become`: how many, and the bytes of each."""
        kept = {name: to_bytes(p.data) for name, p in self._model.scorer.named_parameters()}
        return len(kept), kept

    def become(self, weights: Mapping[str, NDArray[np.uint8]]) -> None:
        """Takes the weights that another copy gave."""
        import torch

        with torch.no_grad():
            for name, parameter in self._model.scorer.named_parameters():
                entry = TensorEntry.of(name, parameter)
                parameter.data.copy_(from_bytes(weights[name], entry))
        self._model.changed()

    def save(self, directory: str) -> None:
        """Writes the weights, for `load`."""
        from safetensors.torch import save_file

        tensors = {name: p.detach().cpu().clone() for name, p in self._model.scorer.named_parameters()}
        with writing(directory):
            Path(directory).mkdir(exist_ok=True)  # it may be written again, after a loss
            save_file(tensors, Path(directory) / "model.safetensors")

    def load(self, directory: str) -> None:
        """Takes the weights that `save` wrote.

        Raises:
            CheckpointError: There are none.
        """
        import torch
        from safetensors.torch import load_file

        path = Path(directory) / "model.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{path} is not there: the checkpoint was saved without --sync_ref_model true, so what its "
                "reference was is not known"
            )
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in self._model.scorer.named_parameters():
                parameter.copy_(saved[name])
        self._model.changed()
