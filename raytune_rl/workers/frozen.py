"""A frozen language model in a worker: what reference and teachers are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from raytune_rl.errors import CheckpointError, ModelError
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Settled, TunerSettings
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.protocol.weights import Manifest, TensorEntry
from raytune_rl.runtime.imports import import_once
from raytune_rl.runtime.weights import from_bytes, read, to_bytes
from raytune_rl.workers import scoring
from raytune_rl.workers.offload import Frozen, empty_cache
from raytune_rl.workers.probed import Probed
from raytune_rl.workers.saving import writing

FOLLOWS = {"reference": "--sync_ref_model true", "teacher": "--teacher_sync_steps"}
"""By role, what makes such a model follow the policy."""


class FrozenModel:
    """A model that is only asked.

    Args:
        spec: Which one; its adapters are put on it.
        settings: How log-probs are taken.

    Attributes:
        scorer: The module; see `scoring.scorer_of`.
        settings: As given.
        settled: How its rows are laid out.
    """

    def __init__(self, spec: ModelSpec, settings: ScoreSettings) -> None:
        import_once("raytune_rl.models.load", "raytune_rl.workers.isolation")
        from raytune_rl.models.tuner import apply_tuner
        from raytune_rl.workers import isolation

        loaded = scoring.load(spec)
        model: Any = loaded.model
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), scoring.adapters(spec)).model
        self._media = scoring.media_collator(spec, loaded, always=False)
        self.settings = settings
        self.scorer = scoring.scorer_of(model, "logprobs").eval().requires_grad_(False)
        self.settled = isolation.settle_rows(self.scorer, spec, self._media)
        self._spec = replace(spec, layout=self.settled.layout)
        self._weights = Frozen(self.scorer.parameters())

    def offload(self, weights: bool) -> None:
        """Moves its weights to the CPU if they are wanted away, and gives back what the allocator keeps."""
        if weights:
            self._weights.away()
        empty_cache()

    def reload(self) -> None:
        """Brings back what `offload` moved."""
        self._weights.back()

    def changed(self) -> None:
        """Its weights were changed in place."""
        self._weights.changed()

    def logprobs(self, batch: RowBatch) -> tuple[NDArray[np.float64], Columns]:
        """See `scoring.score`."""
        return scoring.score(self.scorer, batch, self._spec, self.settings, self._media)

    @property
    def vocabulary(self) -> int:
        """Tokens that its distribution is over."""
        return int(self.scorer.model.config.get_text_config().vocab_size)

    def likeliest(
        self, batch: RowBatch, k: int
    ) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.float32]]]:
        """See `opinions.Asked`."""
        import torch

        rows = scoring.read_rows(batch, self.settings.timeout_s)
        scoring.expect_media(rows, batch, self._media)
        with torch.no_grad():
            for members in batch.micro_batches:
                micro = scoring.micro_batch(rows, members, self._spec.layout, self._media)
                top = self.scorer(
                    **scoring.forward_inputs(micro),
                    temperature=self.settings.temperature,
                    disallowed_token_ids=self.settings.disallowed_token_ids,
                    top=k,
                ).top
                counts = np.bincount(micro.row_of.cpu().numpy(), minlength=len(members))
                ends = np.cumsum(counts)[:-1]
                ids = np.split(top[0].cpu().numpy().astype(np.int32), ends)
                logprobs = np.split(top[1].cpu().numpy(), ends)
                yield from zip(members, ids, logprobs, strict=True)


class FrozenWorker(Probed):
    """A copy of a model that is only asked, in an actor.

    Without a state of its own, unless it is told to `mix` (Gorbatovski et al. 2024, "Learn your reference
    model for real good alignment").
    """

    role: ClassVar[str]
    """What it is to the run; see `FOLLOWS`."""

    def __init__(self, spec: ModelSpec, settings: ScoreSettings) -> None:
        self._model = FrozenModel(spec, settings)

    def ping(self) -> Settled:
        """Proves that the model is loaded; how its rows are laid out."""
        return self._model.settled

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
                        f"{name} has another form in memory than the policy publishes; this model cannot "
                        "follow the policy"
                    )
                own_tensor.lerp_(published.to(own_tensor), share)
        self._model.changed()
        if own:
            raise ModelError(f"the policy does not publish {sorted(own)[0]}, so this model cannot follow it")

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
                f"{path} is not there: the checkpoint was saved without {FOLLOWS[self.role]}, so what its "
                f"{self.role} was is not known"
            )
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in self._model.scorer.named_parameters():
                parameter.copy_(saved[name])
        self._model.changed()
