"""How large a model is, and what of it a tuner trains: counted on a model without data, in about a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytune_rl.errors import ModelError
from raytune_rl.models.hub import first_line, resolve_path
from raytune_rl.models.load import auto_class, load_config
from raytune_rl.models.scalar import scalar_class
from raytune_rl.models.tuner import apply_tuner, trains_vision
from raytune_rl.protocol.model import ModelSize, ModelSpec, TowerSize, TunerSettings


class UnknownSizeError(ModelError):
    """A model that can be loaded but not be counted beforehand."""


def size_of(spec: ModelSpec, tuner: TunerSettings | None = None, *, scalar: bool = False) -> ModelSize:
    """The size of a model on disk or on a hub; only its config is read.

    Args:
        spec: Which model.
        tuner: What is trained; None: nothing.
        scalar: It has a head of one output.

    Raises:
        ModelError: There is none.
        UnknownSizeError: It cannot be built from its config alone.
    """
    local = resolve_path(spec.path, use_hf=spec.use_hf, config_only=True)
    return measure(load_config(local, trust_remote_code=spec.trust_remote_code), tuner, scalar=scalar)


def measure(config: Any, tuner: TunerSettings | None = None, *, scalar: bool = False) -> ModelSize:
    """The size of the model that a Transformers config describes; see `size_of`."""
    text = config.get_text_config()
    try:
        if scalar:
            config.num_labels = 1
        kind = scalar_class(config) if scalar else auto_class(config)
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.bfloat16)
            total = sum(p.numel() for p in model.parameters())
            linear = sum(
                module.weight.numel()
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
            )
            trained, sees = ([], False) if tuner is None else _trained(model, tuner)
    except (ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise UnknownSizeError(
            f"the model's size cannot be told from its config: {first_line(error)}"
        ) from error
    heads = int(getattr(text, "num_attention_heads", 1))
    latent = getattr(text, "kv_lora_rank", None)  # MLA keeps one vector for all heads
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    inner = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        inner = int(experts) * int(getattr(text, "moe_intermediate_size", None) or inner)
    return ModelSize(
        parameters=total,
        linear=linear,
        trained=sum(count for count, _ in trained),
        trained_16_bit=sum(count for count, wide in trained if not wide),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=inner,
        kv_width=int(latent) + int(text.qk_rope_head_dim) if latent else 2 * kv_heads * head,
        vocabulary=int(text.vocab_size),
        tower=_tower(config, sees),
    )


def _trained(model: Any, tuner: TunerSettings) -> tuple[list[tuple[int, bool]], bool]:
    """Of each trainable parameter: its elements, and whether it is float32 whatever the base is; and whether
    one lies where only media pass.
    """
    tuned = apply_tuner(model, tuner).model
    trained = [(p.numel(), p.dtype == torch.float32) for p in tuned.parameters() if p.requires_grad]
    return trained, trains_vision(tuned)


def _tower(config: Any, trained: bool) -> TowerSize | None:
    """The tower of images that a config describes, by the names that Transformers' families have for it; None
    where there is none, or none that can be read.
    """
    vision: Any = getattr(config, "vision_config", None)

    def of(*names: str, where: tuple[Any, ...] = (vision,)) -> Any:
        return next((v for one in where for n in names if (v := getattr(one, n, None))), None)

    layers, hidden = of("depth", "num_hidden_layers", "num_layers"), of("embed_dim", "hidden_size")
    if not (layers and hidden):
        return None
    both = (vision, config)
    merge, ratio = of("spatial_merge_size", "scale_factor", where=both), of("downsample_ratio", where=both)
    patches = float(merge) ** 2 if merge else float(ratio) ** -2 if ratio else 1.0
    if (tokens := of("mm_tokens_per_image", where=both)) and of("image_size", "patch_size"):
        patches = (vision.image_size / vision.patch_size) ** 2 / tokens
    inner = of("intermediate_size") or hidden * (of("mlp_ratio") or 4)
    return TowerSize(int(layers), int(hidden), int(inner), patches, trained)
