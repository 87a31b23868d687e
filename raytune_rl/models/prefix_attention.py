"""Attention over rows that begin alike: what they share is computed once, and each row sees it and itself.

Rows in this layout are one packed row, group after group: [shared | own 1 | .. | own G]. Every layer but
attention works on tokens one by one and needs nothing; attention is two calls of the model's own function for
each group, causal over what is shared, and the rows' own tokens, row by row, over what is shared and
themselves. No mask over the packed row is ever made, and soft caps, sinks and scaling are the model's own.

How the rows lie reaches the layers in the place of the attention mask: Transformers hands a mask of four axes
on as it is. It is int32 `[1, 1, groups, 1 + most own]`, of each group the tokens that are shared and those of
each row beyond them, and zeros; no model has a mask of that type. With any other mask the function is the
model's own.

The same idea in inference: Juravsky et al. 2024, "Hydragen"; in training: Liu et al. 2025, "Prefix Grouper".
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytune_rl.errors import ModelError

Groups = Sequence[Sequence[int]]
"""Of each group how many tokens are shared, and how many of its own each row has."""

_NAME = "shared_prefix_"
_INNER = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
AT_ONCE = 2
"""From so many times as many shared tokens as own ones on, all rows' own tokens see them in one call: what a
token then looks at in vain is less than what copying the shared keys for each row would cost."""
_OF_WHOLE_ROWS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments by which flash attention would look for borders in what it is given."""
_BOTH_WAYS = ("block_sequence_ids", "or_mask_function")
"""Arguments of Transformers' masks by which a model lets tokens see what comes after them."""
_KINDS = {"full_attention", "sliding_attention"}


def short_mask(groups: Groups) -> Tensor:
    """What stands in the place of the attention mask; it stays on the CPU, where reading it waits for
    nobody."""
    width = max(len(group) for group in groups)
    return torch.tensor([[[[*group, *[0] * (width - len(group))] for group in groups]]], dtype=torch.int32)


def let_share(model: PreTrainedModel, with_media: bool = False) -> str:
    """Puts the function into a model; rows laid out otherwise are computed as before.

    Args:
        model: It.
        with_media: Whether rows have media, whose tokens some models let see each other both ways.

    Returns:
        Why it cannot be put there; empty if it is.
    """
    text: Any = model.config.get_text_config()
    inner = text._attn_implementation
    if inner not in _INNER:
        return f"there is no way to share with the attention {inner}"
    kinds = set(getattr(text, "layer_types", None) or ()) - _KINDS
    if kinds:
        return f"its layers have {', '.join(sorted(kinds))}"
    if with_media and any(
        word in inspect.getsource(sys.modules[type(model).__module__]) for word in _BOTH_WAYS
    ):
        return "tokens of its media see each other both ways"
    parts = _language_parts(model)
    if not all(part._can_set_attn_implementation() for part in parts):
        return "its attention does not go through Transformers' AttentionInterface"
    AttentionInterface.register(_NAME + inner, _shared(inner))
    AttentionMaskInterface.register(_NAME + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    for part in parts:
        part.config._attn_implementation = _NAME + inner
    return ""


def take_back(model: PreTrainedModel) -> None:
    """Undoes `let_share`."""
    for part in _language_parts(model):
        part.config._attn_implementation = part.config._attn_implementation.removeprefix(_NAME)


def _language_parts(model: PreTrainedModel) -> list[Any]:
    """Modules with the config of the language model: layers read their attention's name from it."""
    kind = type(model.config.get_text_config())
    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and type(m.config) is kind]


def _shared(inner_name: str) -> Callable[..., tuple[Tensor, Any]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        """query [B, heads, T, width]; key and value may have fewer heads. Returns [B, T, heads, width]."""
        inner = _inner_function(inner_name, module)
        if attention_mask is None or attention_mask.dtype != torch.int32 or attention_mask.ndim != 4:
            return inner(module, query, key, value, attention_mask, **options)
        window = _window(module, options)
        options = {name: given for name, given in options.items() if name not in _OF_WHOLE_ROWS}

        def call(states: Sequence[Tensor], sees: Tensor | None) -> Tensor:
            mask = None if sees is None else _as_mask(inner_name, sees, query)
            found: Tensor = inner(module, *states, mask, **options)[0]
            return found

        parts: list[Tensor] = []
        start = 0
        for prefix, *own in attention_mask[0, 0].tolist():
            own = [length for length in own if length]
            border, end = start + prefix, start + prefix + sum(own)
            group = [states[:, :, start:border] for states in (query, key, value)]
            causal = inner_name == "sdpa" and (window is None or prefix <= window)  # it knows by itself
            parts.append(call(group, None if causal else _sees(0, prefix, window, query.device)))
            if own:
                past = prefix if window is None else min(prefix, window - 1)
                group = [
                    query[:, :, border:end],
                    *(states[:, :, border - past : end] for states in (key, value)),
                ]
                sees = _sees(past, max(own), window, query.device)
                if past >= AT_ONCE * sum(own) and not inner_name.startswith("flash"):
                    parts.append(call(group, _of_all(sees, own)))
                else:
                    parts.append(_without_padding(call(_rows_of(group, own), sees), own))
            start = end
        return torch.cat(parts, dim=1), None

    return attention


def _inner_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    if name == "eager":  # each model has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _window(module: Any, options: dict[str, Any]) -> int | None:
    """The tokens that a layer sees at most, by the rule by which Transformers makes its masks.

    Raises:
        ModelError: the layer itself says otherwise.
    """
    config, layer = module.config, getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or layer is None or kinds[layer] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if slides else None
    if options.get("sliding_window") != window:
        raise ModelError(
            f"layer {layer} sees {options.get('sliding_window')} tokens, and {window} by its config"
        )
    return window


def _rows_of(states: Sequence[Tensor], own: Sequence[int]) -> list[Tensor]:
    """Query, key and value [1, heads, tokens, width] as a batch of rows, filled up with zeros behind; each
    row's keys begin with what comes before all of them."""
    query, key, value = states
    past = key.shape[2] - sum(own)
    before = [one[:, :, :past].expand(len(own), -1, -1, -1) for one in (key, value)]
    q, k, v = (_by_row(one[0], own) for one in (query, key[:, :, past:], value[:, :, past:]))
    return [q, torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)]


def _by_row(states: Tensor, own: Sequence[int]) -> Tensor:
    """[heads, sum of own, width] as [rows, heads, most own, width], filled up with zeros behind."""
    if len(set(own)) == 1:
        return states.unflatten(1, (len(own), own[0])).transpose(0, 1)
    rows = states.transpose(0, 1).split(list(own))
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2)


def _without_padding(rows: Tensor, own: Sequence[int]) -> Tensor:
    """[rows, most own, heads, width] as [1, sum of own, heads, width]."""
    return torch.cat([row[:length] for row, length in zip(rows, own, strict=True)])[None]


def _sees(past: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `past + length` tokens each of the last `length` sees, bool."""
    sees = torch.ones(length, past + length, dtype=torch.bool, device=device).tril_(past)
    return sees if window is None else sees.triu_(past - window + 1)


def _of_all(sees: Tensor, own: Sequence[int]) -> Tensor:
    """The same of all rows' own tokens, one row after the other, from that of the longest row."""
    past, total = sees.shape[1] - sees.shape[0], sum(own)
    made = sees.new_zeros(total, past + total)
    start = 0
    for length in own:
        end = start + length
        made[start:end, :past] = sees[:length, :past]
        made[start:end, past + start : past + end] = sees[:length, past : past + length]
        start = end
    return made


def _as_mask(inner: str, sees: Tensor, query: Tensor) -> Tensor | None:
    """The mask as the inner function takes it; flash attention knows it by itself."""
    if inner.startswith("flash"):
        return None
    if inner == "sdpa":
        return sees[None, None]
    least = torch.finfo(query.dtype).min
    return torch.zeros_like(sees, dtype=query.dtype).masked_fill_(~sees, least)[None, None]
