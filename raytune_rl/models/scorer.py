"""The module that training wraps: micro-batch in, log-probs of its loss tokens out.

DeepSpeed and DDP must see the forward of one module that touches every parameter; this is it. Only the hidden
states that predict a loss token reach the head, so prompts and padding cost nothing there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytune_rl.errors import ModelError
from raytune_rl.models.borders import accepts_borders, borders_of
from raytune_rl.models.distribution import TeacherDistribution, token_divergence, top_logprobs
from raytune_rl.models.logprobs import (
    TokenLogprobs,
    default_chunk_tokens,
    logit_shape,
    squared_probabilities,
    token_logprobs,
)
from raytune_rl.models.positions import positions_with_videos, shared_positions
from raytune_rl.models.prefix_attention import Groups, short_mask
from raytune_rl.models.routing import experts_per_token, router_sums
from raytune_rl.models.sharding import shape_of
from raytune_rl.models.unwrap import hf_model


class TokenScorer(nn.Module):
    """Wraps a causal LM, an image-text model or a PeftModel of either.

    Attributes:
        model: the model as given; its tuner layers are active inside the backbone.
        chunk_tokens: tokens per pass through the head.
        tells_borders: whether layers are told where packed rows begin, beside the position ids.
        masks_padding: whether layers are told of the padding behind rows, which a causal model does not see.
    """

    tells_borders = False
    masks_padding = True

    def __init__(self, model: nn.Module, chunk_tokens: int | None = None) -> None:
        """Looks up backbone and head.

        Args:
            model: from `load_model` or `apply_tuner`.
            chunk_tokens: None chooses by vocabulary size.

        Raises:
            ModelError: the model has no separate backbone and output head (it is not a causal language
                model).
        """
        super().__init__()
        self.model = model
        inner = hf_model(model)
        head = inner.get_output_embeddings()
        if inner.base_model is inner or head is None:
            raise ModelError(
                f"{type(inner).__name__} has no separate backbone and output head, so its hidden states "
                "cannot be scored in chunks; use one that Transformers loads as a causal or image-text model"
            )
        config = inner.config.get_text_config()
        self.softcap, self.logit_scale = _logit_shape(inner)
        self.chunk_tokens = chunk_tokens or default_chunk_tokens(config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        predict_index: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
        disallowed_token_ids: tuple[int, ...] = (),
        shared: Groups = (),
        teacher: TeacherDistribution | None = None,
        top: int = 0,
        with_router: bool = False,
        with_squares: bool = False,
        **model_inputs: Any,
    ) -> TokenLogprobs:
        """Log-probs of the loss tokens.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], or the model's own multi-axis shape, or None; restarting positions
                with `attention_mask=None` mean packed rows, which do not see each other.
            attention_mask: int64 [B, T], 1 on tokens, or None.
            predict_index: int64 [N], index into the flattened [B * T] of the state that predicts each token.
            targets: int64 [N].
            temperature: the sampling temperature.
            with_entropy: also return entropies.
            disallowed_token_ids: tokens that sampling never gives.
            shared: of rows that share their beginnings, how they lie (`prefix_attention`), with
                `attention_mask=None`; empty: they share none.
            teacher: also return the divergence from it.
            top: also return so many of the likeliest tokens.
            with_router: also sum up what the routers of a mixture of experts chose; not with `shared`, whose
                beginnings would count once.
            with_squares: also return the sums of the squared probabilities, without gradient.
            **model_inputs: passed to the backbone (pixel_values, image_grid_thw, ...).

        Returns:
            float32 [N] each. N = 0 (a dummy micro-batch) gives empty tensors that are still connected to
            every parameter, so that a rank without work takes part in the gradient collectives with zeros.
        """
        inner = hf_model(self.model)
        if with_router:
            model_inputs["output_router_logits"] = True
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
            attention_mask=short_mask(shared) if shared else self._mask(attention_mask, model_inputs),
            use_cache=False,
            **model_inputs,
        )
        states = output.last_hidden_state
        hidden = states.reshape(-1, states.shape[-1])[predict_index]
        head = inner.get_output_embeddings()
        scored = token_logprobs(
            hidden,
            head,
            targets,
            temperature,
            self.chunk_tokens,
            with_entropy,
            self.softcap,
            self.logit_scale,
            disallowed_token_ids,
        )
        if teacher is not None or top or with_squares:
            shape = logit_shape(temperature, self.softcap, self.logit_scale, disallowed_token_ids)
            if teacher is not None:
                scored = scored._replace(
                    divergence=token_divergence(hidden, head, shape, teacher, self.chunk_tokens)
                )
            if top:
                scored = scored._replace(top=top_logprobs(hidden, head, shape, top, self.chunk_tokens))
            if with_squares:
                squares = squared_probabilities(hidden, head, shape, self.chunk_tokens)
                scored = scored._replace(squares=squares)
        if not with_router:
            return scored
        logits = tuple(getattr(output, "router_logits", None) or ())
        if not logits or shared:
            raise ModelError(
                f"--router_aux_loss_coef: {type(inner).__name__} does not tell what its routers chose, or "
                "rows share their beginnings; leave it out"
            )
        probabilities, counts = router_sums(logits, attention_mask, experts_per_token(inner.config))
        return scored._replace(router_probabilities=probabilities, router_counts=counts)

    def _mask(self, given: Tensor | None, model_inputs: dict[str, Any]) -> Tensor | None:
        """With media the model makes positions of its mask; a text's padding may go without."""
        return given if self.masks_padding or model_inputs else None

    def can_tell_borders(self) -> bool:
        """See `accepts_borders`."""
        return accepts_borders(hf_model(self.model).base_model)

    @torch.no_grad()
    def verify(self, tokens: int = 8, tolerance: float = 1e-3) -> None:
        """Compares a short text scored here with the model's own logits; run once after loading: while
        its engine is running, if the model is cut into shares.

        A model may do something to its logits that this class has not heard of; training on would then be
        silently wrong.

        Raises:
            ModelError: they differ by more than `tolerance` (times 64 below float32).
        """
        inner = hf_model(self.model)
        weight = inner.get_input_embeddings().weight
        was_training = self.training
        self.eval()
        ids = torch.arange(tokens, device=weight.device)[None] % shape_of(weight)[0]
        positions = torch.arange(tokens, device=weight.device)[None]
        index = torch.arange(tokens - 1, device=weight.device)
        mask = torch.ones_like(ids)
        mine = self(ids, positions, mask, index, ids[0, 1:]).logprobs
        logits = inner(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        theirs = logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        self.train(was_training)
        gap = (mine - theirs).abs().max().item()
        if not gap <= tolerance * (1 if weight.dtype == torch.float32 else 64):
            raise ModelError(
                f"log-probs of {type(inner).__name__} through its backbone and head differ by {gap:.3g} from "
                "its own: it transforms its logits in a way that raytune_rl does not know; please report it"
            )


def _logit_shape(inner: nn.Module) -> tuple[float | None, float | None]:
    """(softcap, factor) that the model's own forward applies to its head's output, from its config."""
    config: Any = inner.config
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    if getattr(text, "logit_scale", None) is not None:  # Cohere
        return softcap, float(text.logit_scale)
    if getattr(text, "logits_scaling", None) is not None:
        divides = not str(text.model_type).startswith(
            "hyperclovax"
        )  # Granite divides by it, HyperCLOVA multiplies
        return softcap, float(1 / text.logits_scaling if divides else text.logits_scaling)
    if getattr(text, "lm_head_multiplier", None) is not None:  # Falcon-H1
        return softcap, float(text.lm_head_multiplier)
    return softcap, None
