"""Weights under the names they have in a Hugging Face checkpoint, for publishing to engines and for saving.

Transformers may hold a model in another shape than its checkpoint has (fused experts, renamed parts); engines
and `from_pretrained` know the checkpoint's. The reverse mapping is Transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytune_rl.errors import ModelError
from raytune_rl.models.adapters import ties
from raytune_rl.models.checkpoint_names import checkpoint_form, renames_twice
from raytune_rl.models.sharding import own_tensors
from raytune_rl.models.sources import Source, plain_sources
from raytune_rl.models.unwrap import hf_model, is_peft, peft_model, tuned_model
from raytune_rl.protocol.weights import TensorEntry
from raytune_rl.tracking.files import follow_umask

Mode = Literal["full", "merged", "adapter"]
Gather = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""Makes parameters whole inside a `with`, where a sharded engine (ZeRO-3) has cut them up: a collective."""


def whole(tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """The `Gather` of an engine that keeps every parameter whole."""
    return nullcontext()


class WeightExporter:
    """Publishes a model's weights, again and again, while it is being trained.

    The plan (names, shapes, which source makes which tensor) is made once; `tensors` reads the current
    values. Ranks may share the work by each asking for its own names: a source that nobody asks for is not
    computed.

    Attributes:
        index: every tensor that `tensors()` yields, in that order.
        unties: whether a model whose config ties head and embedding has two matrices in `index`: its adapter
            has made one of them another, or its files have both.
    """

    def __init__(self, model: nn.Module, mode: Mode) -> None:
        """Plans the export.

        Args:
            model: a PreTrainedModel or PeftModel, or a wrapper of one (TokenScorer, DDP, a DeepSpeed engine
                below ZeRO-3). For ZeRO-3: before the engine is started, which cuts adapters up too.
            mode: "full": the parameters as they are. "merged": base plus adapter, the model itself left
                untouched. "adapter": what adapter_model.safetensors holds, under the names it has there.

        Raises:
            ModelError: the mode does not fit the model, or its adapter has no merged form.
        """
        self.mode = mode
        self._hf: Any = hf_model(model)
        self._peft = peft_model(model)
        if mode in ("merged", "adapter") and self._peft is None:
            raise ModelError(f"weights cannot be exported as '{mode}': the model has no adapter")
        if mode == "full" and self._peft is not None:
            raise ModelError(
                "weights cannot be exported as 'full': the model has an adapter; use merged or adapter"
            )
        self._groups: list[_Group] = []
        self.unties = False
        if mode == "adapter":
            self.index = tuple(TensorEntry.of(n, t) for n, t in self._adapter_state().items())
        else:
            self._groups = _plan(self._hf, self._sources())
            self.index = tuple(spec for group in self._groups for spec in group.specs)

    def tensors(
        self, names: Collection[str] | None = None, gather: Gather = whole
    ) -> Iterator[tuple[str, Tensor]]:
        """Current values, detached and in the order of `index`.

        Args:
            names: only these; None means all.
            gather: where parameters are sharded: then every rank must go through all of `tensors`, whatever
                names it asks for.

        Yields:
            (name, tensor). A tensor may share memory with the model: copy it before the next optimizer step.

        Raises:
            ModelError: a name is not in `index`.
        """
        wanted = {spec.name for spec in self.index} if names is None else set(names)
        unknown = wanted - {spec.name for spec in self.index}
        if unknown:
            raise ModelError(f"no weight is named '{sorted(unknown)[0]}'")
        if self.mode == "adapter":
            assert self._peft is not None
            with gather([p for p in self._peft.parameters() if p.requires_grad]):
                yield from ((n, t.detach()) for n, t in self._adapter_state().items() if n in wanted)
            return
        for group in self._groups:
            unwanted = wanted.isdisjoint(spec.name for spec in group.specs)
            if unwanted and gather is whole:
                continue
            with gather([part for source in group.sources for part in source.parts]):
                if unwanted:
                    continue
                made = {source.name: source.make() for source in group.sources}
                if group.converts:
                    made = checkpoint_form(self._hf, made)
                yield from ((spec.name, made[spec.name]) for spec in group.specs if spec.name in wanted)

    def _sources(self) -> list[Source]:
        if self._peft is None:
            sources = list(plain_sources(self._hf))
        else:
            from raytune_rl.models.merge import merged_sources  # imports PEFT

            sources = list(merged_sources(self._peft))
        # A tied head is the embedding under a second name; engines tie it themselves and want it once.
        copies = set(getattr(self._hf, "all_tied_weights_keys", None) or {})
        sources.sort(key=lambda source: source.name in copies)
        unique: dict[tuple[int, ...], Source] = {}
        for source in sources:
            unique.setdefault(tuple(map(id, source.parts)), source)
        # Where the files have both matrices, Transformers forgets the ties that the class declares.
        if ties(self._hf.config):
            copies |= set(getattr(type(self._hf), "_tied_weights_keys", None) or ())
        self.unties = any(source.name in copies for source in unique.values())
        return list(unique.values())

    def _adapter_state(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        assert self._peft is not None
        adapter = str(self._peft.active_adapters[0])
        return dict(get_peft_model_state_dict(self._peft, adapter_name=adapter, save_embedding_layers=False))


def export_tensors(model: nn.Module, mode: Mode) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every weight; see `WeightExporter` for arguments and errors."""
    yield from WeightExporter(model, mode).tensors()


def save_model(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    gather: Gather = whole,
    writes: bool = True,
) -> None:
    """Writes what `transformers` (or PEFT, for an adapter) loads directly: safetensors, config, tokenizer.

    The caller makes it whole-or-absent by writing into a temporary directory and renaming it.

    Args:
        model: as in `WeightExporter`.
        directory: created if missing.
        tokenizer: tokenizer or processor to put beside the weights.
        gather: where parameters are sharded: then every rank must call this.
        writes: whether this process writes; of several ranks only one does.
    """
    inner = tuned_model(model)
    state = None if gather is whole else _gathered_state(inner, gather, writes)
    if not writes:
        return
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    if is_peft(inner):
        # "auto" would look the base model up on the hub to see whether its vocabulary grew; ours never does.
        inner.save_pretrained(
            str(target), safe_serialization=True, save_embedding_layers=False, state_dict=state
        )
        base = inner.get_base_model()
        if getattr(base, "generation_config", None) is not None and base.can_generate():
            base.generation_config.save_pretrained(str(target))  # with what ends an answer
    elif renames_twice(inner):
        form = checkpoint_form(inner, dict(inner.state_dict()) if state is None else state)
        inner.save_pretrained(str(target), state_dict=form, save_original_format=False)
    else:
        inner.save_pretrained(str(target), state_dict=state)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    for file in target.glob("*.safetensors"):
        follow_umask(file)


def _gathered_state(inner: Any, gather: Gather, keep: bool) -> dict[str, Tensor]:
    """State dict of a sharded model on the CPU, module by module; of a PeftModel only what was trained."""
    adapter_only = is_peft(inner)
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in inner.named_modules():
        tensors = {
            (f"{name}." if name else "") + key: tensor
            for key, tensor in own_tensors(module)
            if id(tensor) not in seen and (tensor.requires_grad or not adapter_only)
        }
        seen |= {id(tensor) for tensor in tensors.values()}
        with gather(list(tensors.values())):
            if keep:
                state |= {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    return state


@dataclass(frozen=True)
class _Group:
    """Sources that turn into checkpoint tensors together; `converts` is False where they already are them."""

    specs: tuple[TensorEntry, ...]
    sources: tuple[Source, ...]
    converts: bool


def _plan(hf: Any, sources: list[Source]) -> list[_Group]:
    """Groups of sources that turn into checkpoint tensors on their own, as small as the conversion allows.

    Found by running the conversion on tensors without data: tensor by tensor, else layer by layer, else all
    at once.
    """
    whole = _group(hf, sources)
    single = [[source] for source in sources]
    by_layer: dict[str, list[Source]] = {}
    for source in sources:
        layer = re.match(r".*?\.layers\.\d+\.", source.name)
        by_layer.setdefault(layer.group(0) if layer else "", []).append(source)
    for cut in (single, list(by_layer.values())):
        groups = [_group(hf, part) for part in cut]
        specs = [spec for group in groups for spec in group.specs]
        if len(specs) == len(whole.specs) and set(specs) == set(whole.specs):
            return groups
    return [whole]


def _group(hf: Any, sources: list[Source]) -> _Group:
    empty = {s.name: torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources}
    converted = checkpoint_form(hf, dict(empty))
    specs = tuple(TensorEntry.of(name, tensor) for name, tensor in converted.items())
    same = converted.keys() == empty.keys() and all(converted[name] is empty[name] for name in empty)
    return _Group(specs, tuple(sources), converts=not same)
