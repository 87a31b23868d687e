"""Models that are cut into shares while they are loaded, one share a rank (ZeRO-3; Rajbhandari et al. 2020).

Transformers builds a model under `deepspeed.zero.Init` while a DeepSpeed configuration of stage 3 is known to
it: each parameter is cut as soon as it exists, and whole again only while its weights are read. PEFT looks at
the same sign. Such a parameter is empty outside its layer's forward, so its size must be asked for here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytune_rl.config.deepspeed import fill_auto


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor; of a parameter that is cut, that of the whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def numel_of(tensor: Tensor) -> int:
    """The number of values in a tensor; of a parameter that is cut, in the whole."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are cut."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module that a checkpoint keeps, its children not counted: parameters and persistent
    buffers.
    """
    yield from module.named_parameters(recurse=False)
    passing = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module.named_buffers(recurse=False) if n not in passing)


@contextmanager
def zero_init(zero: Mapping[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Inside, Transformers cuts up what it loads: a collective of the world that torch.distributed has
    joined.

    Args:
        zero: the section zero_optimization of a DeepSpeed configuration, of stage 3.
        dtype: of the weights, which DeepSpeed would otherwise take from what is trained.
    """
    import deepspeed

    deepspeed.init_distributed()
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed reads no configuration without
        "zero_optimization": dict(zero),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    with _announced(fill_auto(config, {})):
        yield


@contextmanager
def known_to_peft(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT gathers the parameters of a model that is cut where it looks at them."""
    if not is_sharded(model):
        yield
        return
    with _announced({"zero_optimization": {"stage": 3}}):
        yield


@contextmanager
def changing(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Makes cut parameters whole inside and takes over what rank 0 makes of them: a collective.

    What is whole already may be among them.
    """
    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not cut:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(cut, modifier_rank=0):
        yield


@dataclass(frozen=True)
class Examined:
    """The view of a checkpoint without its data.

    Attributes:
        info: Transformers' loading info; empty where `why_whole` was clear before.
        why_whole: why the model cannot be loaded cut; empty if it can.
        buffers: dtypes of the buffers that the model makes itself, by name.
    """

    info: Mapping[str, Any] = field(default_factory=dict)
    why_whole: str = ""
    buffers: Mapping[str, torch.dtype] = field(default_factory=dict)


def examine(
    auto_class: Any, config: Any, directory: str, zero: Mapping[str, Any], options: Mapping[str, Any]
) -> Examined:
    """Loads a model without its data, to see what its checkpoint lacks and whether it can be loaded cut.

    When Transformers loads cut it looks neither for weights too many, nor, but on rank 0, at shapes; here
    every rank sees the same before the first collective.

    Args:
        auto_class: the class that is going to load it.
        config: of the model.
        directory: holds the weights.
        zero: as in `zero_init`.
        options: of from_pretrained.
    """
    if zero.get("mics_shard_size", -1) > 0:
        return Examined(why_whole="mics_shard_size cuts in another way")
    if getattr(config, "auto_map", None) and options.get("trust_remote_code"):
        return Examined(why_whole="it is built by Python code of its own")
    files = _safetensors(Path(directory))
    if not files:
        return Examined(why_whole="its weights are not safetensors")
    model, info = _without_data(auto_class, config, files, options)
    stored = [tensor for module in model.modules() for _, tensor in own_tensors(module)]
    if {tensor.dtype for tensor in stored if tensor.is_floating_point()} - {options["dtype"]}:
        return Examined(info, "it keeps some weights in another type than the rest")
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if model.get_parameter(target) is not model.get_parameter(source):
            return Examined(info, f"its checkpoint has the tied weight {target} twice")
    return Examined(info, buffers={name: buffer.dtype for name, buffer in model.named_buffers()})


@torch.no_grad()
def mend_buffers(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Makes the buffers anew that a cut model has in its weights' type, such as the frequencies of positions:
    DeepSpeed rounds whatever floats a model makes while it is built.

    Args:
        model: loaded cut.
        dtypes: of its buffers, as `Examined` has them.
    """
    for prefix, module in model.named_modules():
        wrong = [
            (name, dtypes[full])
            for name, buffer in module.named_buffers(recurse=False)
            if dtypes.get(full := f"{prefix}.{name}".lstrip("."), buffer.dtype) != buffer.dtype
        ]
        for name, dtype in wrong:
            module._buffers[name] = module._buffers[name].to(dtype)
        if wrong:
            model._init_weights(module)  # leaves alone what was loaded, which bears a mark


def _without_data(
    auto_class: Any, config: Any, files: list[Path], options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import logging

    shapes: dict[str, Tensor] = {}
    for file in files:
        shapes |= load_state_dict(str(file), map_location="meta")
    mapping = getattr(auto_class, "_model_mapping", None)
    concrete = auto_class if mapping is None else mapping[type(config)]
    given = {name: value for name, value in options.items() if name != "trust_remote_code"}
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # the load that follows reports
    logging.disable_progress_bar()
    try:
        model, info = concrete.from_pretrained(
            None, state_dict=shapes, device_map={"": "meta"}, output_loading_info=True, **given
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return model, info


def _safetensors(directory: Path) -> list[Path]:
    """The files that Transformers reads a model's weights from; none if they are of another kind."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(named))]
    return []


@contextmanager
def _announced(config: dict[str, Any]) -> Iterator[None]:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(config)  # Transformers itself keeps only a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held
