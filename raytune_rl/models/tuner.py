"""The trained part of a model: everything, or adapters put on top (LoRA, DoRA, rsLoRA, QLoRA through a
quantised base)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raytune_rl.errors import ModelError
from raytune_rl.models import experts
from raytune_rl.models.adapters import head_of_its_own, open_adapter, untie
from raytune_rl.models.load import takes_media
from raytune_rl.models.sharding import changing, is_sharded, known_to_peft, numel_of
from raytune_rl.models.unwrap import hf_model, is_peft, scalar_head
from raytune_rl.protocol.model import TunerSettings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# Names of the module that maps image features into the language model's space, over the families Transformers
# has.
_ALIGNER_NAMES = ("merger", "multi_modal_projector", "connector", "aligner", "mlp1", "embed_vision")


@dataclass(frozen=True)
class TunedModel:
    """A model with the right parameters marked trainable.

    Attributes:
        model: PeftModel for LoRA, the given model for full training.
        trainable: number of trainable parameters.
        total: number of all parameters.
        notices: lines for the user about choices made for them.
    """

    model: Any
    trainable: int
    total: int
    notices: tuple[str, ...]


def apply_tuner(
    model: PreTrainedModel, settings: TunerSettings, adapters: Sequence[str] = (), *, resize: bool = False
) -> TunedModel:
    """Makes a loaded model trainable.

    Args:
        model: from `load_model`; a quantised one takes LoRA only. If it is cut into shares, this is a
            collective.
        settings: what to train.
        adapters: local adapter directories to start from. LoRA goes on training the last one, after merging
            those before it; full training merges them all.
        resize: whether an adapter that brings embeddings for more or fewer tokens resizes the model's.

    Raises:
        ModelError: an adapter is missing or does not fit, nothing matches the targets, or the request cannot
            be trained (a quantised base in full).
    """
    with known_to_peft(model):
        return _apply_tuner(model, settings, adapters, resize)


def _apply_tuner(
    model: PreTrainedModel, settings: TunerSettings, adapters: Sequence[str], resize: bool
) -> TunedModel:
    notices: list[str] = []
    quantized = bool(getattr(model, "is_quantized", False))
    if settings.tuner_type == "full" and quantized:
        raise ModelError(
            "a quantised base cannot be trained in full; use --tuner_type lora, or load it unquantised"
        )
    keep = list(adapters[-1:]) if settings.tuner_type == "lora" else []
    merged = list(adapters[: len(adapters) - len(keep)])
    if merged and quantized:
        raise ModelError(
            "adapters cannot be merged into a quantised base without loss; merge them with export first"
        )
    for adapter in merged:
        model = _merged(open_adapter(model, adapter, resize=resize))
        notices.append(f"adapter '{adapter}' is merged into the base before training")
    if merged and head_of_its_own(model):
        untie(model.config)
    if settings.tuner_type == "full":
        _freeze_parts(model, settings)
        return _report(model, notices)
    from peft import get_peft_model, prepare_model_for_kbit_training

    if quantized:
        # Norms to float32 and base frozen; layer recomputation is the caller's choice, not PEFT's.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if keep:
        notices.append(
            f"training goes on with adapter '{keep[0]}'; its own rank and targets hold, not the flags; "
            f"dropout is {settings.lora_dropout:g}"
        )
        peft = open_adapter(model, keep[0], dropout=settings.lora_dropout, resize=resize)
        return _report(peft, notices)
    if sentence := experts.left_out(model, experts.matching(model, settings.target_parameters)):
        notices.append(sentence)
    return _report(get_peft_model(model, _lora_config(model, settings)), notices)


def narrow_adapters(model: Any, dtype: torch.dtype) -> None:
    """Turns a model's adapters to the type that it computes in, for an optimizer that has float32 master
    weights. PEFT makes them float32, so that a layer's input is turned to float32 and kept for the backward,
    and both products take several times as long on a GPU; engines serve adapters in their own type anyway.

    Left as they are: DoRA, whose magnitudes are near to what they came from, and shares of ZeRO-3.
    """
    if not is_peft(model) or is_sharded(model) or _has_magnitudes(model):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)


def _has_magnitudes(model: PeftModel) -> bool:
    return any("lora_magnitude_vector" in name for name, _ in model.named_parameters())


def trains_vision(model: nn.Module) -> bool:
    """Whether something that only media pass through is trainable: a tower or the aligner."""
    inner = hf_model(model)
    part_of = _parts(inner)
    return any(p.requires_grad and part_of(name) != "llm" for name, p in inner.named_parameters())


def _lora_config(model: PreTrainedModel, settings: TunerSettings) -> LoraConfig:
    from peft import LoraConfig, TaskType

    init = {"true": True, "false": False}.get(settings.init_weights.lower(), settings.init_weights)
    targets = _targets(model, settings)
    scalar = scalar_head(model) is not None
    return LoraConfig(
        # With SEQ_CLS PEFT trains the head in full and saves it with the adapter.
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias=settings.lora_bias,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        init_lora_weights=init,
        target_modules=_compact(model, targets),
        target_parameters=list(settings.target_parameters) or None,
        modules_to_save=list(settings.modules_to_save) or None,
    )


def _targets(model: PreTrainedModel, settings: TunerSettings) -> list[str]:
    """Full names of the modules that get an adapter."""
    modules = dict(model.named_modules())
    if settings.target_regex is not None:
        targets = [name for name in modules if re.fullmatch(settings.target_regex, name)]
        if not targets:
            raise ModelError(
                f"target_regex '{settings.target_regex}' matches no module of {type(model).__name__}"
            )
        return targets
    targets = []
    for target in settings.target_modules:
        if target in ("all-linear", "all-embedding"):
            hits = _all_of(model, (nn.Linear, Conv1D) if target == "all-linear" else nn.Embedding, settings)
        else:
            hits = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not hits and target.startswith("all-"):
            raise ModelError(
                f"target_modules '{target}': freeze_llm, freeze_vit and freeze_aligner leave no such module "
                f"of {type(model).__name__} to train"
            )
        if not hits:
            names = sorted({n.rsplit(".", 1)[-1] for n, m in modules.items() if isinstance(m, nn.Linear)})
            raise ModelError(
                f"target_modules '{target}' matches no module of {type(model).__name__}; "
                f"its linear layers are named {', '.join(names)}"
            )
        targets += [name for name in hits if name not in targets]
    return targets


def _all_of(
    model: PreTrainedModel,
    module_class: type[nn.Module] | tuple[type[nn.Module], ...],
    settings: TunerSettings,
) -> list[str]:
    heads = (scalar_head(model), model.get_output_embeddings())
    part_of = _parts(model)
    frozen = _frozen(settings)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, module_class) and module not in heads and part_of(name) not in frozen
    ]


def _frozen(settings: TunerSettings) -> set[str]:
    flags = {"llm": settings.freeze_llm, "vit": settings.freeze_vit, "aligner": settings.freeze_aligner}
    return {part for part, frozen in flags.items() if frozen}


def _parts(model: PreTrainedModel) -> Any:
    """Module or parameter name -> "llm", "vit" or "aligner"; everything of a text model is "llm"."""
    if not takes_media(model.config):
        return lambda name: "llm"
    decoder = model.get_decoder()
    prefixes = [name for name, module in model.named_modules() if module is decoder]
    heads = (model.get_output_embeddings(), scalar_head(model))
    prefixes += [name for name, module in model.named_modules() if module in heads]

    def part(name: str) -> str:
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            return "llm"
        return "aligner" if any(piece in _ALIGNER_NAMES for piece in name.split(".")) else "vit"

    return part


def _compact(model: PreTrainedModel, targets: list[str]) -> list[str] | str:
    """The shortest form that PEFT resolves to exactly these modules; it is written into
    adapter_config.json."""
    names = [name for name, _ in model.named_modules()]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in targets})
    if {name for name in names if name.rsplit(".", 1)[-1] in suffixes} == set(targets):
        return suffixes
    # Layer numbers collapse, except at the end: the linear layers of an nn.Sequential are 0 and 2, say, but
    # not 1.
    patterns = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in targets}
    regex = "|".join(sorted(patterns))
    if {name for name in names if re.fullmatch(regex, name)} == set(targets):
        return regex
    return targets


def _freeze_parts(model: PreTrainedModel, settings: TunerSettings) -> None:
    frozen, part_of = _frozen(settings), _parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "nothing is left to train: freeze_llm, freeze_vit and freeze_aligner freeze every part"
        )


def _merged(peft: PeftModel) -> Any:
    """The base with the adapter merged in. PEFT's own merge is for whole weights: cut ones are gathered layer
    by layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not is_sharded(peft):
        return peft.merge_and_unload()
    for layer in peft.modules():
        if isinstance(layer, BaseTunerLayer):
            with changing(layer.get_base_layer().parameters()):
                layer.merge()
    return peft.unload()


def _report(model: Any, notices: list[str]) -> TunedModel:
    # A 4-bit parameter holds two weights a byte; PEFT knows, so its count is used where there is one.
    if is_peft(model):
        trainable, total = model.get_nb_trainable_parameters()
    else:
        total = sum(numel_of(p) for p in model.parameters())
        trainable = sum(numel_of(p) for p in model.parameters() if p.requires_grad)
    return TunedModel(model, trainable, total, tuple(notices))
