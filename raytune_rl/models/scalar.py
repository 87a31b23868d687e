"""The module that training wraps where a model gives numbers instead of tokens: reward model and critic.

Both are a backbone and a head of one output, in the layout of Transformers' sequence classification with one
label. A reward model reads the head at the end of each row, a critic before each loss token; that is all the
difference there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
)

from raytune_rl.errors import ModelError
from raytune_rl.models.borders import accepts_borders, borders_of
from raytune_rl.models.positions import positions_with_videos, shared_positions
from raytune_rl.models.prefix_attention import Groups, short_mask
from raytune_rl.models.sharding import shape_of
from raytune_rl.models.unwrap import hf_model, scalar_head


class ScalarScorer(nn.Module):
    """Wraps a model from `load_model(scalar=True)`, or a PeftModel of one.

    Attributes:
        model: the model as given; its tuner layers are active inside the backbone.
        skips_padding: whether an index that points at a padding token of the model's config means the last
            token before it that is none, which is where Transformers reads a row's score.
        tells_borders: whether layers are told where packed rows begin, beside the position ids.
    """

    tells_borders = False

    def __init__(self, model: nn.Module, *, skips_padding: bool = False) -> None:
        """Looks up backbone and head.

        Args:
            model: see above.
            skips_padding: see above.

        Raises:
            ModelError: there is no head of one output.
        """
        super().__init__()
        self.model = model
        self.skips_padding = skips_padding
        inner = hf_model(model)
        if inner.base_model is inner or scalar_head(inner) is None:
            raise ModelError(f"{type(inner).__name__} has no head of one output over a backbone")
        self._pad: int | None = inner.config.get_text_config().pad_token_id

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        state_index: Tensor,
        shared: Groups = (),
        **model_inputs: Any,
    ) -> Tensor:
        """The head's output at some tokens.

        Args:
            input_ids, position_ids, attention_mask: as `TokenScorer.forward` takes them.
            state_index: int64 [N], index into the flattened [B * T] of the states to read.
            shared: as `TokenScorer.forward` takes it.
            **model_inputs: passed to the backbone.

        Returns:
            float32 [N]. N = 0 (a dummy micro-batch) gives an empty tensor that is still connected to every
            parameter.
        """
        states = self.states(input_ids, position_ids, attention_mask, state_index, shared, **model_inputs)
        return hf_model(self.model).score(states).float().squeeze(-1)

    def states(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        state_index: Tensor,
        shared: Groups = (),
        **model_inputs: Any,
    ) -> Tensor:
        """The hidden states [N, H] that the head reads; arguments as in `forward`."""
        inner = hf_model(self.model)
        if shared:
            along_axes = shared_positions(inner.base_model, input_ids, shared, model_inputs)
            position_ids = position_ids if along_axes is None else along_axes
        elif position_ids is None:
            position_ids = positions_with_videos(inner.base_model, input_ids, attention_mask, model_inputs)
        elif self.tells_borders and attention_mask is None:
            model_inputs |= borders_of(position_ids)
        output = inner.base_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=short_mask(shared) if shared else attention_mask,
            use_cache=False,
            **model_inputs,
        )
        if self.skips_padding:
            state_index = self._before_padding(input_ids.reshape(-1), state_index)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[state_index]

    def can_tell_borders(self) -> bool:
        """See `accepts_borders`."""
        return accepts_borders(hf_model(self.model).base_model)

    def _before_padding(self, flat_ids: Tensor, index: Tensor) -> Tensor:
        while self._pad is not None and bool((at_pad := flat_ids[index] == self._pad).any()):
            index = (index - at_pad.long()).clamp(min=0)
            if not bool(index.any()):
                break
        return index

    @torch.no_grad()
    def verify(self, tokens: int = 8, tolerance: float = 1e-3) -> None:
        """Compares the score of a short text with the model's own forward; see `TokenScorer.verify`.

        Raises:
            ModelError: they differ by more than `tolerance` (times 64 below float32).
        """
        inner = hf_model(self.model)
        weight = inner.get_input_embeddings().weight
        was_training = self.training
        self.eval()
        pad = -1 if self._pad is None else self._pad
        known = torch.arange(tokens + 1, device=weight.device)
        ids = known[known != pad][None, :tokens] % shape_of(weight)[0]
        positions, mask = torch.arange(tokens, device=weight.device)[None], torch.ones_like(ids)
        mine = self(ids, positions, mask, positions[0, -1:])
        theirs = inner(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        self.train(was_training)
        gap = (mine - theirs.float().reshape(-1)).abs().max().item()
        if not gap <= tolerance * (1 if weight.dtype == torch.float32 else 64):
            raise ModelError(
                f"the score of {type(inner).__name__} through its backbone and head differs from its own by "
                f"{gap:.3g}; please report it"
            )


def scalar_class(config: Any) -> Any:
    """The class that loads a model of this config with a scalar head.

    Language models for which Transformers has none (Granite, most image-text models) get one made as it
    makes its own, so their checkpoints have the same layout; but only raytune_rl knows the class.

    Raises:
        ModelError: there is none, and none can be made.
    """
    model_type, remote = config.model_type, getattr(config, "auto_map", None) or {}
    known = model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if known or "AutoModelForSequenceClassification" in remote:
        return AutoModelForSequenceClassification
    speakers = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    speaker = next((found[type(config)] for found in speakers if type(config) in found), None)
    backbone = MODEL_MAPPING.get(type(config), None)
    if speaker is None or not isinstance(backbone, type):
        raise ModelError(f"Transformers knows no sequence classification for model type '{model_type}'")
    name = backbone.__name__.removesuffix("Model")
    parent = next(
        base
        for base in backbone.__mro__
        if base.__name__.endswith("PreTrainedModel") and base is not backbone
    )
    # Its weights go by the names that checkpoints with the head over the vocabulary have.
    prefix = {"base_model_prefix": speaker.base_model_prefix}
    made = type(f"{name}ForSequenceClassification", (GenericForSequenceClassification, parent), prefix)
    names = get_checkpoint_conversion_mapping(speaker.__name__)
    if names is not None:
        register_checkpoint_conversion_mapping(made.__name__, names, overwrite=True)
    return made


def give_single_label(config: Any, path: str, tokenizer: Callable[[], Any]) -> None:
    """Prepares a model's config: one label, and a padding token, by which Transformers finds rows' ends.

    Args:
        config: of the model, changed here.
        path: where it came from, for the error.
        tokenizer: gives the model's tokenizer, whose padding (or end) token serves where the config has none.

    Raises:
        ModelError: it is a classifier of several labels.
    """
    if "ForSequenceClassification" in "".join(config.architectures or ()) and config.num_labels != 1:
        raise ModelError(f"'{path}' is a classifier of {config.num_labels} labels; one score is wanted")
    config.num_labels = 1
    text = config.get_text_config()
    if text.pad_token_id is None:
        found = tokenizer()
        text.pad_token_id = found.eos_token_id if found.pad_token_id is None else found.pad_token_id


def beside_the_head(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[list[str], list[str]]:
    """Weights that a checkpoint lacks beside the scalar head, and has too many beside that over the
    vocabulary."""
    return (
        [name for name in missing if not name.startswith("score.")],
        [name for name in unexpected if not name.startswith("lm_head.")],
    )
