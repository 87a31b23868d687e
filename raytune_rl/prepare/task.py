"""The data task: reading, understanding and tokenizing rows, on the driver's own machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from raytune_rl.config import PreferenceConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.data.example import Task
from raytune_rl.data.mapped import MappedColumns, open_columns, written_whole
from raytune_rl.errors import DataError
from raytune_rl.prepare.cache import (
    SETS,
    EncodedSet,
    RowFacts,
    prune,
    read_entry,
    write_entry,
    write_facts,
)
from raytune_rl.prepare.facts import account_of, model_facts
from raytune_rl.prepare.judges import check_vocabulary, refuse_demonstrations, teacher_of_rows
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.progress import RowProgress, Tell, stream_progress
from raytune_rl.prepare.read import load_sets, quarantine_dropped, quarantines
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.data import TEACHER_PROMPT, TEACHER_PROMPT_TOKENS

RowsEncoder = Callable[..., tuple[Columns, RowFacts]]


def encode_prompts_task(config: RLHFConfig, quarantine: str, places: MediaPlaces) -> Iterator[Any]:
    """Prompts to train on and, if there are any, held out: of each (lengths, account), then its columns,
    extra columns and texts. In between, sentences on how far it is."""
    for item in stream_progress(lambda tell: _encoded_prompts(config, Path(quarantine), places, tell)):
        if isinstance(item, str):
            yield item
            continue
        # Ray sends values into a generator; a tuple would not take them.
        yield from (part for part in item)


def _encoded_prompts(
    config: RLHFConfig, quarantine: Path, places: MediaPlaces, tell: Tell
) -> Iterator[tuple[Any, ...]]:
    from raytune_rl.data.encode import EncodedPrompts, MediaSettings, encode_prompts
    from raytune_rl.data.example import Example, conversations
    from raytune_rl.data.teacher_prompts import encode_teacher_prompts, has_views

    facts = model_facts(config)
    tokenizer = facts.tokenizer
    if config.own_reference and config.ref_model:
        check_vocabulary(tokenizer, config.ref_model, config, "--ref_model")
    for teacher in config.teacher_model:
        check_vocabulary(tokenizer, teacher, config, "--teacher_model")
    media = MediaSettings(facts.media, places.root, places.inline) if facts.media else None
    bad_rows = quarantines(config, quarantine)
    for stale in bad_rows:  # of an earlier start of the same run
        stale.unlink(missing_ok=True)
    for part, path in zip(load_sets(config, "grpo", quarantine, tell), bad_rows, strict=True):
        if part is None:
            continue
        examples, report = part

        def encode(
            rows: Sequence[Example], max_length: int | None, truncation: str, total: int = len(examples)
        ) -> EncodedPrompts:
            return encode_prompts(
                rows,
                tokenizer,
                max_length,
                truncation,  # type: ignore[arg-type]
                strict=config.strict,
                num_proc=config.dataset_num_proc,
                progress=RowProgress("tokenized", tell, total),
                media=media,
                model=facts.tokens,
            )

        taught = None
        if config.has_teachers and has_views(examples):
            refuse_demonstrations(config)
            room = None if facts.max_positions is None else facts.max_positions - config.max_completion_length
            taught = encode_teacher_prompts(
                examples, partial(encode, max_length=room, truncation="delete"), strict=config.strict
            )
            examples = taught.examples
        encoded = encode(examples, config.max_length, resolved.truncation_strategy(config))
        if taught is not None:
            encoded = replace(
                encoded,
                dropped=(*taught.dropped, *encoded.dropped),
                notices=(*taught.notices, *encoded.notices),
            )
        left_out = quarantine_dropped(encoded.dropped, path) or report.quarantine_path
        columns = {"prompt": encoded.prompts, **encoded.media}
        if encoded.engine_prompt_ids is not None:
            columns["engine_prompt_ids"] = encoded.engine_prompt_ids
        shown = (
            encoded.prompts if encoded.engine_prompt_ids is None else encoded.engine_prompt_ids
        )  # one placeholder a medium is readable
        texts = tokenizer.batch_decode([shown[i].tolist() for i in range(len(shown))])
        extra = {**encoded.extra, **conversations([examples[i] for i in encoded.index])}
        account = replace(account_of(report, encoded, facts, left_out), columns=tuple(extra))
        if TEACHER_PROMPT in extra and not config.has_teachers:
            idle = (
                f"the column {TEACHER_PROMPT!r} does nothing: there is no --teacher_model; --model can be one"
            )
            account = replace(account, notices=(*account.notices, idle))
        values = {}
        if taught is not None:
            asked = taught.prompts.take(encoded.index.tolist())
            columns[TEACHER_PROMPT] = asked
            values[TEACHER_PROMPT_TOKENS] = asked.lengths.astype(np.float64)
        if config.teacher_column is not None:
            values["teacher"] = teacher_of_rows(extra, config.teacher_column, config.teacher_model)
        yield (encoded.prompts.lengths, account, values), columns, extra, texts


def encode_rows_task(
    config: SFTConfig | PreferenceConfig, task: Task, quarantine: str, places: MediaPlaces, cache: str
) -> Iterator[Any]:
    """Rows to train on and, if there are any, held out: of each its facts, then its columns. In between,
    sentences on how far it is.

    What has been encoded before is taken from `cache`, a folder, where it is kept too.
    """
    for item in stream_progress(
        lambda tell: _encoded_sets(config, task, Path(quarantine), places, Path(cache), tell)
    ):
        if isinstance(item, str):
            yield item
            continue
        yield item.facts
        shared = isinstance(item.columns, MappedColumns) and places.one_machine
        yield item.columns if shared else dict(item.columns)


def _encoded_sets(
    config: SFTConfig | PreferenceConfig,
    task: Task,
    quarantine: Path,
    places: MediaPlaces,
    cache: Path,
    tell: Tell,
) -> list[EncodedSet]:
    bad_rows = dict(zip(SETS, quarantines(config, quarantine), strict=True))
    for path in bad_rows.values():  # of an earlier start of the same run
        path.unlink(missing_ok=True)
    if isinstance(config, PreferenceConfig) and config.own_reference and config.ref_model:
        check_vocabulary(model_facts(config).tokenizer, config.ref_model, config, "--ref_model")
    key = _key(config, task, places, tell)
    if key is None:
        return [encoded for _, encoded in _encode(config, task, bad_rows, places, None, tell)]
    entry = cache / key
    cached = read_entry(entry, bad_rows) if config.load_from_cache_file else None
    if cached is not None:
        notice = f"data as encoded before, from {entry} (--load_from_cache_file false encodes it anew)"
        notices = [notice, prune(cache, entry)]
        return [replace(one, facts=_with_notices(one.facts, notices)) for one in cached]
    try:
        with written_whole(entry) as folder:
            encoded = dict(_encode(config, task, bad_rows, places, folder, tell))
            write_entry(folder, {name: one.facts.account for name, one in encoded.items()}, bad_rows)
    except OSError as error:
        raise DataError(
            f"encoded rows cannot be written to {cache}: {error}. Make room, or name another folder with "
            "--dataset_cache_dir (and with TMPDIR, where rows wait before they are encoded)"
        ) from error
    notices = [prune(cache, entry)]
    return [
        replace(one, columns=open_columns(str(entry / name)), facts=_with_notices(one.facts, notices))
        for name, one in encoded.items()
    ]


def _with_notices(facts: RowFacts, notices: Sequence[str | None]) -> RowFacts:
    known = tuple(notice for notice in notices if notice is not None)
    return facts._replace(account=replace(facts.account, notices=(*known, *facts.account.notices)))


def _key(config: SFTConfig | PreferenceConfig, task: Task, places: MediaPlaces, tell: Tell) -> str | None:
    """The name of what these data become; None where that cannot be told."""
    from raytune_rl.data.fingerprint import fingerprint
    from raytune_rl.data.load import resolve_system
    from raytune_rl.data.sources import Identity, Preparing
    from raytune_rl.models import load

    assert config.model is not None
    names = (
        "dataset", "val_dataset", "split_dataset_ratio", "columns", "max_length", "loss_scale", "strict",
        "max_pixels", "video_max_pixels", "fps", "fps_max_frames", "dataset_shuffle", "data_seed",
        "trust_remote_code", "model_name", "model_author",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names} | {
        "task": task,
        "system": resolve_system(config.system),
        "truncation": resolved.truncation_strategy(config),
        "places": (places.root, places.inline),
        "channels": _channels(config),
    }
    model = Path(load.resolve_path(config.model, use_hf=config.use_hf))
    specs = (*config.dataset, *config.val_dataset)
    preparing = Preparing(config.columns, Identity(config.model_name, config.model_author))
    return fingerprint(settings, specs, model, use_hf=config.use_hf, preparing=preparing, tell=tell)


def _channels(config: SFTConfig | PreferenceConfig) -> bool:
    """Whether rows shall tell their channel."""
    return isinstance(config, SFTConfig) and config.enable_channel_loss


def _encode(
    config: SFTConfig | PreferenceConfig,
    task: Task,
    bad_rows: Mapping[str, Path],
    places: MediaPlaces,
    folder: Path | None,
    tell: Tell,
) -> Iterator[tuple[str, EncodedSet]]:
    """The sets by name, encoded anew; into `folder`, or into memory without one."""
    encode = rows_encoder(config, task, places)
    for name, part in zip(SETS, load_sets(config, task, bad_rows["train"], tell), strict=True):
        if part is None:
            continue
        inside = None if folder is None else folder / name
        if inside is not None:
            inside.mkdir()
        examples, report = part
        progress = RowProgress("tokenized", tell, len(examples))
        columns, facts = encode(examples, report, bad_rows[name], progress, inside)
        if folder is not None:
            write_facts(folder, name, facts.loss_lengths, facts.values)
        yield name, EncodedSet(columns, facts)


def rows_encoder(config: SFTConfig | PreferenceConfig, task: Task, places: MediaPlaces) -> RowsEncoder:
    """A function that makes columns and facts of examples, their report and a file for bad rows."""
    from raytune_rl.data.encode import MediaSettings, encode_sft
    from raytune_rl.data.encode_preferences import encode_labelled, encode_pairs

    facts = model_facts(config)
    media = MediaSettings(facts.media, places.root, places.inline) if facts.media else None
    encoders: dict[str, Any] = {"sft": encode_sft, "pairs": encode_pairs, "labels": encode_labelled}

    def encode(
        examples: Any,
        report: Any,
        bad_rows: Path,
        progress: Callable[[int], None] | None = None,
        folder: Path | None = None,
        held: set[tuple[str, int]] | None = None,
    ) -> tuple[Columns, RowFacts]:
        encoded = encoders[task](
            examples,
            facts.tokenizer,
            config.max_length,
            resolved.truncation_strategy(config),
            config.loss_scale,
            strict=config.strict,
            num_proc=config.dataset_num_proc,
            progress=progress,
            media=media,
            folder=folder,
            model=facts.tokens,
            **({"channels": True} if _channels(config) else {}),
        )
        path = quarantine_dropped(encoded.dropped, bad_rows, held) or report.quarantine_path
        columns = {"tokens": encoded.tokens, "loss_mask": encoded.loss_mask, **encoded.media}
        account = account_of(report, encoded, facts, path)
        return columns, RowFacts(encoded.tokens.lengths, encoded.loss_lengths, account, encoded.values)

    return encode
