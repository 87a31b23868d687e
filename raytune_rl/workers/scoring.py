"""The common part of policy, critic and reference: a model built from a spec, and what it gives for rows by
reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
from numpy.typing import NDArray

from raytune_rl.data.read_rows import ReadRows
from raytune_rl.errors import DataError, ModelError
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ModelSpec, ScoreSettings
from raytune_rl.protocol.rows import RowBatch

if TYPE_CHECKING:
    import torch

    from raytune_rl.algorithms.registry import Forward
    from raytune_rl.data.collate import MicroBatch
    from raytune_rl.data.media_batch import MediaCollator
    from raytune_rl.data.media_table import Medium
    from raytune_rl.models.load import LoadedModel
    from raytune_rl.models.scalar import ScalarScorer
    from raytune_rl.models.scorer import TokenScorer


PAD = 0
"""Fills padded positions. They are masked, so any id of the vocabulary serves."""


def device() -> torch.device:
    """The GPU that Ray gave this actor, or the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load(
    spec: ModelSpec, forward: Forward = "logprobs", zero3: Mapping[str, Any] | None = None
) -> LoadedModel:
    """Loads the base model of a spec onto this worker's device, with the head that `forward` needs; with
    `zero3` this rank's share of it (see `load_model`).

    A critic's new head starts at 0: it foresees nothing, which is nearer to the truth than noise.
    """
    from raytune_rl.models.dropout import silence_dropout
    from raytune_rl.models.load import Quantization, load_model
    from raytune_rl.models.sharding import changing

    loaded = load_model(
        spec.path,
        dtype=spec.dtype,
        attn_impl=spec.attn_impl,
        trust_remote_code=spec.trust_remote_code,
        device=device(),
        quantization=Quantization(bits=spec.quant_bits) if spec.quant_bits else None,
        scalar=forward != "logprobs",
        use_hf=spec.use_hf,
        liger=spec.liger,
        zero3=zero3,
    )
    if loaded.new_head and forward == "values":
        weight = cast(Any, loaded.model).score.weight
        with changing([weight]):
            weight.data.zero_()
    if not spec.own_dropout and (rates := silence_dropout(loaded.model)) is not None:
        notice = f"the model's own dropout ({rates}) is off: it would change log-probs without any learning"
        loaded = replace(loaded, notices=(*loaded.notices, notice))
    return loaded


def adapters(spec: ModelSpec) -> list[str]:
    """Local directories of the adapters to start from, fetched from the hub where they are ids."""
    from raytune_rl.models.hub import resolve_path

    return [resolve_path(adapter, use_hf=spec.use_hf, what="adapter") for adapter in spec.adapters]


def scorer_of(model: Any, forward: Forward) -> TokenScorer | ScalarScorer:
    """The module to train or to ask, checked against the model's own forward; if it is cut into shares, the
    caller must do that once its engine is running."""
    from raytune_rl.models.scalar import ScalarScorer
    from raytune_rl.models.scorer import TokenScorer
    from raytune_rl.models.sharding import is_sharded

    if forward == "logprobs":
        scorer: TokenScorer | ScalarScorer = TokenScorer(model)
    else:
        scorer = ScalarScorer(model, skips_padding=forward == "scores")
    if not is_sharded(model):
        scorer.verify()
    return scorer


def read_rows(batch: RowBatch, timeout_s: float) -> ReadRows:
    """Reads a batch's objects: maps of shared memory on this node, one copy from another."""
    return ReadRows(batch, ray.get(list(batch.refs), timeout=timeout_s))


def media_collator(spec: ModelSpec, loaded: LoadedModel, *, always: bool) -> MediaCollator | None:
    """The collator of a model that takes media; None for a text model.

    Args:
        spec: Of the model.
        loaded: The model.
        always: Whether every micro-batch must pass through the towers of the media, because that is a
            collective.

    Raises:
        ModelError: The processor cannot be used for training, or the layout is packed.
    """
    from raytune_rl.data.media_batch import MediaCollator
    from raytune_rl.data.media_processor import MediaProcessor
    from raytune_rl.models.load import load_media_processor, takes_media

    if not takes_media(loaded.model.config):
        return None
    if spec.layout == "packed":
        raise ModelError(f"{type(loaded.model).__name__} takes media; its rows cannot be packed")
    processor = load_media_processor(loaded.path, trust_remote_code=spec.trust_remote_code)
    if processor is None:
        return None
    media = MediaProcessor.of(processor, spec.media_limits)
    modalities = [
        modality for modality in spec.modalities if media.refusal(modality) is None
    ] or media.modalities[:1]
    return MediaCollator(
        media, dtype=loaded.model.dtype, always=modalities if always else (), threads=spec.media_threads
    )


def end_of_turn_in_files(loaded: LoadedModel, writer: Any) -> tuple[str, ...]:
    """Makes checkpoints of a model stop where the turns that are trained end, and know the chat template; see
    `data.turn_end.stop_in_files`.

    Args:
        loaded: The model; its generation_config is changed.
        writer: The tokenizer or processor that is saved beside it, which gets the template if it has none.
    """
    from raytune_rl.data.chat import ChatTemplate
    from raytune_rl.data.model_tokens import read_eos
    from raytune_rl.data.turn_end import stop_in_files

    generation = getattr(loaded.model, "generation_config", None)
    if generation is None or not loaded.model.can_generate():
        return ()
    is_processor = hasattr(writer, "tokenizer")
    try:
        chat = ChatTemplate.of(writer.tokenizer if is_processor else writer, writer if is_processor else None)
        notice = stop_in_files(replace(chat, eos_token_ids=read_eos(loaded.path)), generation)
    except (ModelError, DataError):  # rows that need no template are trained all the same
        return ()
    return () if notice is None else (notice,)


def expect_media(rows: ReadRows, batch: RowBatch, media: MediaCollator | None) -> None:
    """Begins with the pixels of a batch's micro-batches, in their order."""
    if media is not None:
        media.expect(_media(rows, row) for members in batch.micro_batches for row in members)


def _media(rows: ReadRows, row: int) -> list[Medium]:
    from raytune_rl.data.media_table import ROW_COLUMN, media_of

    return media_of(*rows.source(row, ROW_COLUMN if rows.has_extra(ROW_COLUMN) else ""))


def micro_batch(
    rows: ReadRows, members: Sequence[int], layout: str, media: MediaCollator | None = None
) -> MicroBatch:
    """Collates the rows of one micro-batch on this worker's device; what rows have in common stands once
    where the batch says so."""
    from raytune_rl.data.collate import collate
    from raytune_rl.data.shared_prefix import collate_shared

    laid_out = [rows.laid_out(row) for row in members]
    tokens, masks = [own for own, _ in laid_out], [mask for _, mask in laid_out]
    own = None if rows.prefixes is None else rows.prefixes.part(np.asarray(members, dtype=np.int64))
    if media is not None:
        shown = [_media(rows, row) for row in members]
        return media.collate(tokens, masks, shown, pad_token_id=PAD, prefixes=own).to(device())
    if own is not None:
        micro = collate_shared(tokens, masks, own.groups, own.lengths, pad_token_id=PAD)
        return micro.to(device())
    return collate(tokens, masks, layout=layout, pad_token_id=PAD).to(device())  # type: ignore[arg-type]


def flat_column(rows: ReadRows, members: Sequence[int], name: str) -> torch.Tensor:
    """A float32 `[N]` tensor of one per-token column of the rows' own over a micro-batch's loss tokens; NaN
    for rows without."""
    return _flat([rows.own(name, row) for row in members])


def extra_column(rows: ReadRows, members: Sequence[int], name: str) -> torch.Tensor:
    """The same of a column that was computed later."""
    return _flat([rows.extra(name, row) for row in members])


def _flat(parts: Sequence[np.ndarray]) -> torch.Tensor:
    import torch

    flat = np.concatenate(parts).astype(np.float32) if parts else np.empty(0, np.float32)
    return torch.from_numpy(flat).to(device())


def forward_inputs(micro: MicroBatch, forward: Forward = "logprobs") -> dict[str, Any]:
    """The arguments of `TokenScorer.forward` ("logprobs"), or those of `ScalarScorer.forward`.

    A critic's value of a loss token stands on the state that predicts it: it knows what came before only.
    """
    wanted = {
        "logprobs": {"predict_index": micro.predict_index, "targets": micro.targets},
        "values": {"state_index": micro.predict_index},
        "scores": {"state_index": micro.row_ends},
    }
    return {
        "input_ids": micro.input_ids,
        "position_ids": micro.position_ids,
        "attention_mask": micro.attention_mask,
        **wanted[forward],
        **({"shared": micro.shared} if micro.shared else {}),
        **micro.model_inputs,
    }


def score(
    scorer: TokenScorer | Any,
    batch: RowBatch,
    spec: ModelSpec,
    settings: ScoreSettings,
    media: MediaCollator | None = None,
    with_entropy: bool = False,
    with_squares: bool = False,
) -> tuple[NDArray[np.float64], Columns]:
    """Log-probs of a batch's loss tokens, without gradient.

    Returns:
        Their sum over each row, float64 `[n]`, and {"logprobs": Ragged float32}, and "entropy" likewise if it
        is wanted, in nats, and "squares"; rows in the batch's order.
    """
    import torch

    rows = read_rows(batch, settings.timeout_s)
    expect_media(rows, batch, media)
    more = {"entropy": with_entropy, "squares": with_squares}
    names = ("logprobs", *(name for name, wanted in more.items() if wanted))
    by_name: dict[str, dict[int, np.ndarray]] = {name: {} for name in names}
    with torch.no_grad():
        for members in batch.micro_batches:
            micro = micro_batch(rows, members, spec.layout, media)
            scored = scorer(
                **forward_inputs(micro),
                temperature=settings.temperature,
                with_entropy=with_entropy,
                disallowed_token_ids=settings.disallowed_token_ids,
                **({"with_squares": True} if with_squares else {}),
            )
            counts = np.bincount(micro.row_of.cpu().numpy(), minlength=len(members))
            for name in names:
                flat = getattr(scored, name).cpu().numpy()
                pieces = np.split(flat, np.cumsum(counts)[:-1]) if members else []
                by_name[name].update(zip(members, pieces, strict=True))
    ordered = {name: [pieces[row] for row in range(len(batch))] for name, pieces in by_name.items()}
    sums = np.array([row.sum(dtype=np.float64) for row in ordered["logprobs"]], dtype=np.float64)
    return sums, {name: Ragged.from_rows(rows, np.float32) for name, rows in ordered.items()}


def values(
    scorer: ScalarScorer | Any,
    batch: RowBatch,
    spec: ModelSpec,
    settings: ScoreSettings,
    media: MediaCollator | None = None,
) -> tuple[int, Columns]:
    """A critic's values at a batch's loss tokens, without gradient.

    Returns:
        The number of rows, and {"values": Ragged float32} with the rows in the batch's order.
    """
    import torch

    rows = read_rows(batch, settings.timeout_s)
    by_row: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for members in batch.micro_batches:
            micro = micro_batch(rows, members, spec.layout, media)
            flat = scorer(**forward_inputs(micro, "values")).cpu().numpy()
            counts = np.bincount(micro.row_of.cpu().numpy(), minlength=len(members))
            pieces = np.split(flat, np.cumsum(counts)[:-1]) if members else []
            by_row.update(zip(members, pieces, strict=True))
    return len(batch), {"values": Ragged.from_rows([by_row[row] for row in range(len(batch))], np.float32)}
