"""Finding the Transformers model inside its wrappers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel

from raytune_rl.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel


def is_peft(model: Any) -> TypeGuard[PeftModel]:
    """Whether a model is a PeftModel. PEFT takes a second and a half to import, which only those spend who
    put adapters on: where nobody has imported it, there is no PeftModel.
    """
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def tuned_model(model: nn.Module) -> Any:
    """The PeftModel if there is one, the PreTrainedModel otherwise: what `save_pretrained` belongs to.

    Args:
        model: either of them, or a wrapper that keeps it in `.module` (DDP, DeepSpeed) or `.model`
            (TokenScorer).

    Raises:
        ModelError: there is no such model inside.
    """
    inner: Any = model
    while not (isinstance(inner, PreTrainedModel) or is_peft(inner)):
        wrapped = getattr(inner, "module", None) or getattr(inner, "model", None)
        if not isinstance(wrapped, nn.Module):
            raise ModelError(f"{type(model).__name__} holds no Transformers or PEFT model")
        inner = wrapped
    return inner


def peft_model(model: nn.Module) -> PeftModel | None:
    """The PeftModel inside `model`, or None; arguments and errors as in `tuned_model`."""
    inner = tuned_model(model)
    return inner if is_peft(inner) else None


def hf_model(model: nn.Module) -> Any:
    """The PreTrainedModel inside `model`, with tuner layers in place; arguments and errors as in
    `tuned_model`."""
    inner = tuned_model(model)
    return inner.get_base_model() if is_peft(inner) else inner


def scalar_head(model: Any) -> Any | None:
    """The head of one output of a PreTrainedModel (reward model, critic), or None if it has none."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Module) and model.config.num_labels == 1 else None
