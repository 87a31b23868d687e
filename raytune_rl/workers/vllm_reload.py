"""How new weights get into the modules of a running vLLM model so that all of them are renewed.

vLLM reloads layer by layer (`model_loader.reload`): a layer's parameters are put back into the checkpoint's
shapes without data, its loader collects what arrives, and once the layer is whole it is packed for its kernel
as after the first load and copied into the tensors that the kernels (and CUDA graphs) hold. On a GPU that
renews every packed form that `process_weights_after_loading` makes of a layer's own parameters: Marlin,
Machete and FP8 linear layers, FlashInfer's and AITER's shuffled experts, MLA's absorbed projections. vLLM
0.32 leaves four gaps, and each would go on serving an old weight without a word:

- Experts on a CPU. The kernel's own packing (`moe_kernel.fused_experts.process_weights_after_loading`) runs
  only when the kernel is made; a reload copies plain weights into the packed tensors. So the kernel is given
  up before and made anew. On a GPU it stays: graphs hold its tensors, and there the packing runs on every
  reload.
- A head tied to the embedding on a CPU, which has a packed copy of its own: packed again at the end.
- Parameters that a model writes itself instead of through their loader (gpt_oss: unquantised experts,
  attention sinks), on every device: the write goes to a tensor without data. Such layers are found by what
  the model says it has loaded, and get tensors with data before they are loaded (twice the layers' memory
  meanwhile): NaN, so that one of which the model only says so (a tied head) is told apart and stays as it
  was.
- Latent attention on a CPU with AMX, which frees a projection's weight once it has packed it: there is
  nothing to copy the new one into, so the layer keeps it as after the first load, and attention packs it
  again.

What is still missed is the guard's to find (`pipelines.engine_guard`): every engine proves itself on a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from raytune_rl.workers.vllm_tied import head_apart, with_tied_head

Weights = Callable[[], Iterable[tuple[str, Tensor]]]
"""Gives all weights under their checkpoint names, from the start each time it is called."""


class Reload:
    """Renews the weights of one model, again and again: `start`, `load`, `finish`."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._written_directly: set[str] = set()
        self._kernels: list[tuple[Any, Any]] = []
        self._head_apart = head_apart(model, model_config.hf_config)

    def start(self) -> None:
        """Puts every layer into the checkpoint's form, to be loaded."""
        if current_platform.is_cpu():
            self._kernels = give_up_kernels(self._model)
        name_loaders(self._model)
        initialize_layerwise_reload(self._model)
        if current_platform.is_cpu():
            forget_freed(self._model)
        for layer in self._direct():
            materialize_layer(layer, get_layerwise_info(layer))
            for parameter in floats(layer):
                parameter.data.fill_(torch.nan)

    def load(self, weights: Weights, load: Callable[..., Any] | None = None) -> None:
        """Loads all weights; once more if layers are found that the model writes to itself."""
        load = self._model.load_weights if load is None else load
        missing = bypassed(self._model, load(self._whole(weights)))
        if missing - self._written_directly:
            self.finish()
            self._written_directly |= missing
            self.start()
            load(self._whole(weights))

    def finish(self) -> None:
        """Packs what was not packed while it was loaded."""
        for layer in self._direct():
            info = get_layerwise_info(layer)
            written = any(not parameter.isnan().all() for parameter in floats(layer))
            if written and info.load_numel_total is not None:
                # vLLM counts what its loaders load: to it the layer is begun and not complete, so it is
                # packed now.
                info.load_numel, info.load_numel_total = 1, info.load_numel_total + 1
        finalize_layerwise_reload(self._model, self._model_config)
        for method, kernel in self._kernels:
            if method.moe_kernel is None:  # nothing of its layer was loaded
                method.moe_kernel = kernel
        if current_platform.is_cpu():
            repack_embeddings(self._model)

    def _whole(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        return with_tied_head(weights(), self._head_apart)

    def _direct(self) -> Iterator[nn.Module]:
        for name in sorted(self._written_directly):
            yield self._model.get_submodule(name)


def name_loaders(model: nn.Module) -> None:
    """Gives a name to every parameter's loader: vLLM asks for it, and partial functions (in MiniMax-M2) have
    none."""
    for parameter in model.parameters():
        loader = getattr(parameter, "weight_loader", None)
        if isinstance(loader, partial) and not hasattr(loader, "__name__"):
            vars(loader)["__name__"] = loader.func.__name__


def floats(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's own parameters of floating point."""
    return [p for p in layer.parameters(recurse=False) if p.is_floating_point()]


def bypassed(model: nn.Module, loaded: Iterable[str] | None) -> set[str]:
    """Names of modules with a parameter that the model says it has loaded and that its loader never saw."""
    loaded_names = set(loaded or ())
    unnamed = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if info.load_numel_total is None:
            continue  # complete, and packed
        seen = {parameter for parameter, _ in info.loaded_weights}
        for parameter, tensor in layer.named_parameters(recurse=False):
            full = f"{name}.{parameter}" if name else parameter
            if tensor.is_meta and parameter not in seen and full in loaded_names:
                unnamed.add(name)
    return unnamed


def give_up_kernels(model: nn.Module) -> list[tuple[Any, Any]]:
    """Puts fused experts back to before their first load, where a kernel is made and packs its weights.

    Returns:
        The quantisation method of each, and its kernel.
    """
    kernels: list[tuple[Any, Any]] = []
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            kernels.append((method, method.moe_kernel))
            method.moe_kernel = None
    return kernels


def forget_freed(model: nn.Module) -> None:
    """Lets layers whose weights their kernel has freed keep the new ones, as after the first load: there is
    nothing left to copy them into."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.kernel_tensors is None:
            continue
        kernel_tensors, plain = info.kernel_tensors[0], info.restore_metadata[0]
        if any(
            kernel_tensors[name].numel() == 0 < plain[name].numel()
            for name in kernel_tensors.keys() & plain.keys()
        ):
            info.kernel_tensors = None


def repack_embeddings(model: nn.Module) -> None:
    """Renews the CPU kernels' packed copy of every embedding and language-model head.

    A head tied to the embedding shares its weight but keeps a packed copy of its own, which a reload of the
    embedding does not renew: without this the engine would go on sampling from the old head.
    """
    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
