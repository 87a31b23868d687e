"""Whether the rows of a micro-batch see each other, or the padding, and whether they can share what they
begin with: asked of every model when it is loaded.

Not every architecture of Transformers keeps packed rows apart: some make their attention mask without
position ids, and recurrent and convolution layers run over the borders unless a kernel knows them. A row
must have the log-probs that it has alone, or training would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.shared_prefix import collate_shared
from raytune_rl.errors import ModelError
from raytune_rl.models.hub import first_line
from raytune_rl.models.prefix_attention import let_share, take_back
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.models.sharding import shape_of
from raytune_rl.models.unwrap import hf_model
from raytune_rl.protocol.model import ModelSpec, Settled, Sharing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raytune_rl.data.media_batch import MediaCollator
    from raytune_rl.data.microbatch import Layout

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest difference that is rounding: nats, or shares of a hidden state's root mean square. Rows that do see
each other differ by about 1."""
_LENGTHS = (13, 9)


def settle(scorer: TokenScorer | ScalarScorer, layout: str, flag: str = "") -> Settled:
    """The layout in which a model keeps rows apart: a collective, if the model is cut into shares.

    Args:
        scorer: what is trained or asked; put into eval mode for a moment.
        layout: the one that is wanted.
        flag: by which the user asked for packed rows; empty: nobody did, and padded ones do as well.

    Raises:
        ModelError: rows see each other as the user wants them, or are changed by padding.
    """
    inner: Any = hf_model(scorer)
    model_type, limit = inner.config.model_type, tolerance(scorer)
    notices: tuple[str, ...] = ()
    if layout == "packed":
        packed = _least_gap(scorer)
        if packed <= limit:
            return Settled("packed")
        if flag:
            raise ModelError(
                f"{flag}: packed rows of model type '{model_type}' see each other here: log-probs differ by "
                "up to "
                f"{packed:.2g} from those of each row alone (up to {limit:g} is rounding). Leave the flag "
                "out: padded rows give the right loss"
            )
        notices = (
            f"rows are padded, not packed: packed rows of model type '{model_type}' see each other here "
            "(log-probs "
            f"differ by up to {packed:.2g} from those of each row alone)",
        )
    padded = gap(scorer, "padded")
    if not padded <= limit:
        raise ModelError(
            f"model type '{model_type}' gives a row beside a longer one other log-probs than alone (they "
            "differ by "
            f"up to {padded:.2g}, and {limit:g} is rounding): it does not leave padding out, and cannot be "
            "trained in micro-batches"
        )
    sdpa = inner.config._attn_implementation == "sdpa"
    if isinstance(scorer, TokenScorer) and sdpa and _device(scorer).type == "cuda":
        leave_mask_out(scorer)
    return Settled("padded", notices)


def leave_mask_out(scorer: TokenScorer) -> None:
    """Makes a scorer go without the mask of padding, where rows stay as they are alone: padding stands behind
    them, and a causal model does not look there. Without a mask torch takes its flash kernel, which keeps no
    scores.
    """
    scorer.masks_padding = False
    scorer.masks_padding = not gap(scorer, "padded") <= tolerance(scorer)


def _device(scorer: TokenScorer | ScalarScorer) -> torch.device:
    device: torch.device = hf_model(scorer).get_input_embeddings().weight.device
    return device


def settle_rows(scorer: TokenScorer | ScalarScorer, spec: ModelSpec, media: MediaCollator | None) -> Settled:
    """How a model's rows are laid out, and whether those that begin alike share that part: `settle` and
    `settle_sharing` together."""
    settled = settle(scorer, spec.layout, spec.packing_flag)
    sharing, why_not = settle_sharing(scorer, spec.sharing, media)
    return replace(settled, notices=settled.notices + why_not, sharing=sharing)


def settle_sharing(
    scorer: TokenScorer | ScalarScorer, wanted: Sharing, media: MediaCollator | None = None
) -> tuple[Sharing, tuple[str, ...]]:
    """Whether rows that begin alike share that part: a collective, if the model is cut into shares.

    Args:
        scorer: as in `settle`; its model gets the attention for it.
        wanted: by the user, or for him.
        media: of a model that takes them: rows that begin with the same media share these, too.

    Returns:
        What is wanted, or "false" where the model cannot, and then a line that says why.

    Raises:
        ModelError: "true" is wanted, and the model cannot.
    """
    if wanted == "false":
        return "false", ()
    inner = hf_model(scorer)
    why = let_share(inner, with_media=media is not None)
    if not why:
        why = _fails_to_share(scorer, media)
        if not why:
            return wanted, ()
        take_back(inner)
    notice = (
        f"each row computes its prompt for itself: model type '{inner.config.model_type}' cannot share it"
    )
    if wanted == "true":
        raise ModelError(f"--prefix_sharing true: {notice} ({why}). Leave the flag out")
    return "false", (f"{notice} ({why})",)


def _fails_to_share(scorer: TokenScorer | ScalarScorer, media: MediaCollator | None) -> str:
    """Why the rows that share are not as alone; empty if they are."""
    try:
        found = max(shared_gap(scorer), 0.0 if media is None else media_gap(scorer, media))
    except Exception as error:  # noqa: BLE001 (any model's own code, called as its authors did not foresee)
        return first_line(error)
    limit = tolerance(scorer)
    return "" if found <= limit else f"log-probs differ by up to {found:.2g}, and {limit:g} is rounding"


@torch.no_grad()
def shared_gap(scorer: TokenScorer | ScalarScorer) -> float:
    """The largest difference between what rows that share give and what each gives alone."""
    first, second = _rows(scorer)
    rows = [first, np.concatenate([first[:8], second[:3]]), second, np.concatenate([first[:8], second[2:]])]
    masks = [np.arange(len(row)) > 0 for row in rows]
    micro = collate_shared(rows, masks, [0, 0, 1, 0], [8, 8, 8, 8], pad_token_id=0)
    was_training = scorer.training
    scorer.eval()
    try:
        together = _states_of(scorer, micro)
        alone = torch.cat([_read(scorer, [row], "padded") for row in rows])
    finally:
        scorer.train(was_training)
    difference = (together - alone).abs().max().item()
    return difference if difference == difference else float("inf")


@torch.no_grad()
def media_gap(scorer: TokenScorer | ScalarScorer, media: MediaCollator) -> float:
    """The same of rows that share a medium, which then passes through the model once."""
    was_training = scorer.training
    scorer.eval()
    try:
        gaps = [
            (_states_of(scorer, shared) - _states_of(scorer, padded)).abs().max().item()
            for shared, padded in media.probes()
        ]
    finally:
        scorer.train(was_training)
    return max((found if found == found else float("inf") for found in gaps), default=0.0)


def tolerance(scorer: TokenScorer | ScalarScorer) -> float:
    """See `TOLERANCE`; by the type that the model computes in."""
    return TOLERANCE.get(hf_model(scorer).dtype, TOLERANCE[torch.bfloat16])


def _least_gap(scorer: TokenScorer | ScalarScorer) -> float:
    """The gap of packed rows, without the arguments that tell layers of the borders if it is small so, else
    with them; the scorer keeps what is better."""
    scorer.tells_borders = False
    without = gap(scorer, "packed")
    if without <= tolerance(scorer) or not scorer.can_tell_borders():
        return without
    scorer.tells_borders = True
    with_borders = gap(scorer, "packed")
    scorer.tells_borders = with_borders < without
    return min(with_borders, without)


@torch.no_grad()
def gap(scorer: TokenScorer | ScalarScorer, layout: str) -> float:
    """The largest difference between what rows of a micro-batch give and what each gives alone."""
    was_training = scorer.training
    scorer.eval()
    rows = _rows(scorer)
    together = _read(scorer, rows, cast("Layout", layout))
    alone = torch.cat([_read(scorer, [row], "padded") for row in rows])
    scorer.train(was_training)
    difference = (together - alone).abs().max().item()
    return difference if difference == difference else float("inf")


def _read(scorer: TokenScorer | ScalarScorer, rows: Sequence[NDArray], layout: Layout) -> Tensor:
    masks = [np.arange(len(row)) > 0 for row in rows]
    return _states_of(scorer, collate(rows, masks, layout=layout, pad_token_id=0))


def _states_of(scorer: TokenScorer | ScalarScorer, micro: MicroBatch) -> Tensor:
    micro = micro.to(_device(scorer))
    seen = (micro.input_ids, micro.position_ids, micro.attention_mask)
    more: dict[str, Any] = {"shared": micro.shared, **micro.model_inputs}
    if isinstance(scorer, TokenScorer):
        return scorer(*seen, micro.predict_index, micro.targets, **more).logprobs
    states = scorer.states(*seen, micro.predict_index, **more).float()
    return states / states.square().mean(-1, keepdim=True).sqrt()


def _rows(scorer: TokenScorer | ScalarScorer) -> list[NDArray]:
    """Two rows of ids that mean nothing, without the model's padding token."""
    inner: Any = hf_model(scorer)
    text = inner.config.get_text_config()
    pad = -1 if text.pad_token_id is None else text.pad_token_id
    known = [i for i in range(min(shape_of(inner.get_input_embeddings().weight)[0], 256)) if i != pad]
    return [
        np.array([known[(3 + 7 * i + 5 * number) % len(known)] for i in range(length)])
        for number, length in enumerate(_LENGTHS)
    ]
