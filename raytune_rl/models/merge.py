"""Base plus adapter, one layer at a time, without touching the model.

PEFT's own merge writes into the base weights and has to be undone after every publication, which drifts in
16-bit types. Here each merged tensor is made in float32 beside the base and rounded once to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from raytune_rl.errors import ModelError
from raytune_rl.models.sharding import own_tensors, shape_of
from raytune_rl.models.sources import Source, as_it_is, plain_sources

_QUANTIZED = ("Params4bit", "Int8Params")


def merged_sources(peft: PeftModel) -> Iterator[Source]:
    """Every parameter and persistent buffer of the base model under its name there, adapters merged in,
    quantised ones made dense.

    Raises:
        ModelError: more than one adapter is active, or one is of a kind that has no merged form here.
    """
    adapter = _active_adapter(peft)
    wrapped: tuple[str, ...] = ()
    for name, module in peft.get_base_model().named_modules(remove_duplicate=False):
        if wrapped and name.startswith(wrapped):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            wrapped += (prefix,)
            yield from _layer(prefix, module, adapter)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped += (prefix,)
            if isinstance(module, TrainableTokensWrapper):
                yield from _tokens(prefix, module.token_adapter, adapter)
                continue
            if not isinstance(module, ModulesToSaveWrapper):
                raise ModelError(
                    f"'{name}' is wrapped in {type(module).__name__}, which cannot be merged for export"
                )
            for source in plain_sources(module.modules_to_save[adapter]):
                yield replace(source, name=prefix + source.name)
        else:
            for inner, tensor in own_tensors(module):
                yield _own_tensor(prefix + inner, module, tensor)


def merged_weight(layer: Any, adapter: str) -> Tensor:
    """W + s B A, or DoRA's m * (W + s B A) / ||W + s B A|| (Liu et al. 2024, eq. 5), in the base weight's
    dtype.

    Args:
        layer: PEFT LoRA layer on a linear or embedding module.
        adapter: adapter name.

    Returns:
        The same shape as the base weight; a new tensor, detached.

    Raises:
        ModelError: the layer is of a kind or variant that has no merged form here.
    """
    with torch.no_grad():
        base = dequantize_module_weight(layer.get_base_layer()).detach()
        dora = adapter in layer.lora_magnitude_vector
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not dora:
            raise ModelError(
                f"{getattr(variant, '__name__', type(variant).__name__)} adapters cannot be merged"
            )
        if isinstance(layer, LoraEmbedding) and not dora:
            low, high = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            delta = (high.float() @ low.float()).T
        elif isinstance(layer, nn.Module) and adapter in layer.lora_A and base.ndim == 2:
            delta = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
            delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
        else:
            raise ModelError(f"{type(layer).__name__} adapters (dora: {dora}) cannot be merged for export")
        merged = base.float() + layer.scaling[adapter] * delta
        if dora:
            outputs = 0 if getattr(layer, "fan_in_fan_out", False) else 1
            norm = torch.linalg.norm(merged, dim=outputs, keepdim=True)
            magnitude = layer.lora_magnitude_vector[adapter].weight.float()
            merged = merged * (magnitude.unsqueeze(outputs) / norm)
        return merged.to(base.dtype)


def _active_adapter(peft: PeftModel) -> str:
    active = peft.active_adapters
    if len(active) != 1:
        raise ModelError(f"exactly one adapter must be active to publish merged weights; active: {active}")
    return str(active[0])


def _layer(prefix: str, layer: Any, adapter: str) -> Iterator[Source]:
    if not isinstance(layer, LoraLayer):
        raise ModelError(
            f"'{prefix[:-1]}' is a {type(layer).__name__}; only LoRA layers can be merged for export"
        )
    if layer.merged:
        raise ModelError(f"'{prefix[:-1]}' is merged already; unmerge the model before exporting it")
    if isinstance(layer, ParamWrapper):
        yield from _parameters(prefix, layer, adapter)
        return
    base = layer.get_base_layer()
    has_adapter = adapter in layer.scaling
    for name, tensor in own_tensors(base):
        if name == "weight" and has_adapter:
            dense = _dense_spec(base, tensor)
            parts = (tensor, *_adapter_parts(layer, adapter))
            yield Source(prefix + name, *dense, parts, partial(merged_weight, layer, adapter))
        elif name == "bias" and has_adapter and layer.lora_bias[adapter]:
            parts = (tensor, layer.lora_B[adapter].bias)
            make = partial(_merged_bias, layer, adapter, tensor)
            yield Source(prefix + name, shape_of(tensor), tensor.dtype, parts, make)
        else:
            yield _own_tensor(prefix + name, base, tensor)


def _tokens(prefix: str, layer: Any, adapter: str) -> Iterator[Source]:
    """An embedding, or the head tied to it, of which the adapter has the rows of a few tokens."""
    base, rows = layer.get_base_layer(), layer.trainable_tokens_delta[adapter]
    for name, tensor in own_tensors(base):
        if name != "weight":
            yield _own_tensor(prefix + name, base, tensor)
            continue
        make = partial(_with_rows, tensor, layer.token_indices[adapter], rows)
        yield Source(prefix + name, shape_of(tensor), tensor.dtype, (tensor, rows), make)


def _with_rows(weight: Tensor, indices: list[int], rows: Tensor) -> Tensor:
    made = weight.detach().clone()
    made[indices] = rows.detach().to(made)
    return made


def _parameters(prefix: str, outer: ParamWrapper, adapter: str) -> Iterator[Source]:
    """A module of which adapters change parameters (experts): one wrapper around another, each for one of
    them."""
    wrappers: dict[str, Any] = {}
    layer: Any = outer
    while isinstance(layer, ParamWrapper):
        if adapter in layer.scaling:
            wrappers[layer.parameter_name] = layer
        layer = layer.base_layer
    for name, module in layer.named_modules():
        inside = f"{prefix}{name}." if name else prefix
        for inner, tensor in own_tensors(module):
            wrapper = wrappers.get(inner) if module is layer else None
            if wrapper is None:
                yield _own_tensor(inside + inner, module, tensor)
                continue
            parts = (tensor, *_adapter_parts(wrapper, adapter))
            make = partial(_merged_parameter, wrapper, adapter, tensor)
            yield Source(inside + inner, shape_of(tensor), tensor.dtype, parts, make)


def _merged_parameter(wrapper: Any, adapter: str, base: Tensor) -> Tensor:
    with torch.no_grad():
        return (base.float() + wrapper.get_delta_weight(adapter).float()).to(base.dtype)


def _adapter_parts(layer: Any, adapter: str) -> Iterator[Tensor]:
    """The parameters of one adapter of a layer, whatever kind it is."""
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, {})
        if adapter in held:
            part = held[adapter]
            yield from part.parameters() if isinstance(part, nn.Module) else (part,)


def _merged_bias(layer: Any, adapter: str, bias: Tensor) -> Tensor:
    extra = layer.lora_B[adapter].bias.detach().float() * layer.scaling[adapter]
    return (bias.detach().float() + extra).to(bias.dtype)


def _own_tensor(name: str, module: nn.Module, tensor: Tensor) -> Source:
    if type(tensor).__name__ not in _QUANTIZED:
        return as_it_is(name, tensor)
    return Source(
        name,
        *_dense_spec(module, tensor),
        (tensor,),
        lambda: dequantize_module_weight(module).detach(),
    )


def _dense_spec(module: Any, parameter: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype after dequantisation, which a packed parameter does not show."""
    if type(parameter).__name__ not in _QUANTIZED:
        return shape_of(parameter), parameter.dtype
    dense = dequantize_module_weight(module)
    return tuple(dense.shape), dense.dtype
