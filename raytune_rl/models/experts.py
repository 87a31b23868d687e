"""Weights that lie in no linear layer: fused experts, which LoRA on linear layers does not reach."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from raytune_rl.errors import ModelError
from raytune_rl.models.sharding import numel_of, shape_of
from raytune_rl.models.traits import expert_counts


def fused_experts(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that stack one matrix an expert, `[experts, ., .]`, by their full names."""
    counts = expert_counts(model.config)
    return {
        f"{name}.{inner}" if name else inner: parameter
        for name, module in model.named_modules()
        for inner, parameter in module.named_parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and shape_of(parameter)[0] in counts
    }


def matching(model: PreTrainedModel, endings: Sequence[str]) -> list[str]:
    """Full names of the parameters with these endings, each of which must have some.

    Raises:
        ModelError: One has none, or names what an adapter cannot be put on.
    """
    parameters = dict(model.named_parameters())
    matched: list[str] = []
    for ending in endings:
        hits = [name for name in parameters if name == ending or name.endswith(f".{ending}")]
        if not hits:
            experts = sorted({short(name) for name in fused_experts(model)})
            instead = f"its experts are {', '.join(experts)}" if experts else "it has no fused experts"
            raise ModelError(
                f"target_parameters '{ending}' matches no parameter of {type(model).__name__}; {instead}"
            )
        for name in hits:
            if len(shape_of(parameters[name])) not in (2, 3):
                raise ModelError(
                    f"target_parameters '{ending}': {name} has {len(shape_of(parameters[name]))} dimensions; "
                    "an adapter goes on matrices (2) and stacks of them (3)"
                )
        matched += hits
    return matched


def left_out(model: PreTrainedModel, targets: Sequence[str]) -> str | None:
    """A sentence on fused experts that get no adapter; None where there are none.

    Args:
        model: Before the adapter is put on.
        targets: Full names of the parameters that get one.
    """
    without = {name: tensor for name, tensor in fused_experts(model).items() if name not in targets}
    if not without:
        return None
    share = sum(map(numel_of, without.values())) / sum(map(numel_of, model.parameters()))
    names = " ".join(sorted({short(name) for name in without}))
    return (
        f"the adapter leaves out the experts, {share:.0%} of the model's weights, as they lie in no linear "
        "layer; "
        f"to train them too: --target_parameters {names}"
    )


def short(name: str) -> str:
    """A parameter's name within its layer: what follows the layer's number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers else name
