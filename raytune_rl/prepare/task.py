"""The data task: reading, understanding and tokenizing rows, on the driver's own machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_rl.config import PreferenceConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.config.commands import TrainConfig
from raytune_rl.data.example import Task
from raytune_rl.data.mapped import MappedColumns, open_columns, written_whole
from raytune_rl.data.model_tokens import ModelTokens
from raytune_rl.errors import ConfigError, DataError
from raytune_rl.prepare.cache import (
    SETS,
    EncodedSet,
    RowFacts,
    prune,
    read_entry,
    write_entry,
    write_facts,
)
from raytune_rl.prepare.places import MediaPlaces
from raytune_rl.prepare.progress import RowProgress, Tell, stream_progress
from raytune_rl.protocol.columns import Columns
from raytune_rl.protocol.data import TEACHER_PROMPT, TEACHER_PROMPT_TOKENS, Account
from raytune_rl.protocol.model import Traits
from raytune_rl.redaction import redact_texts


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that its data depend on.

    Attributes:
        tokenizer: Its tokenizer.
        max_positions: The longest sequence it takes, tokens; None if it does not say.
        takes_media: Whether its config says so.
        traits: What an engine has to be set up for.
        media: Its processor, if it takes media and has one.
        tokens: How many tokens it has, and which end an answer.
    """

    tokenizer: Any
    max_positions: int | None
    takes_media: bool
    traits: Traits
    media: Any = None
    tokens: ModelTokens | None = None


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
    bad_rows = _quarantines(config, quarantine)
    for stale in bad_rows:  # of an earlier start of the same run
        stale.unlink(missing_ok=True)
    for part, path in zip(_load(config, "grpo", quarantine, tell), bad_rows, strict=True):
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
        account = replace(_account(report, encoded, facts, left_out), columns=tuple(extra))
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
    bad_rows = dict(zip(SETS, _quarantines(config, quarantine), strict=True))
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
    for name, part in zip(SETS, _load(config, task, bad_rows["train"], tell), strict=True):
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
        account = _account(report, encoded, facts, path)
        return columns, RowFacts(encoded.tokens.lengths, encoded.loss_lengths, account, encoded.values)

    return encode


def model_facts(config: TrainConfig) -> ModelFacts:
    """Reads a model's config and tokenizer, and of a model that takes media the processor."""
    from raytune_rl.data.media_processor import MediaProcessor
    from raytune_rl.models import load
    from raytune_rl.models.context import longest_context
    from raytune_rl.models.traits import traits_of
    from raytune_rl.protocol.media import MediaLimits

    assert config.model is not None
    trust = config.trust_remote_code
    path = load.resolve_path(config.model, use_hf=config.use_hf)
    model = load.load_config(path, trust_remote_code=trust)
    positions = longest_context(model.get_text_config())
    takes_media = load.takes_media(model)
    processor = load.load_media_processor(path, trust_remote_code=trust) if takes_media else None
    tokens = ModelTokens.of(path, model, config.model)
    if processor is None:
        tokenizer = load.load_tokenizer(path, trust_remote_code=trust)
        return ModelFacts(tokenizer, positions, takes_media, traits_of(model), tokens=tokens)
    media = MediaProcessor.of(processor, MediaLimits.of(config))
    return ModelFacts(processor.tokenizer, positions, takes_media, traits_of(model), media, tokens)


def check_vocabulary(tokenizer: Any, model: str, config: TrainConfig, flag: str) -> None:
    """A reference or teacher is asked about the policy's own tokens, so it must mean the same by them. It may
    know more of them, and lack added ones for which its embedding has an empty place.

    Args:
        tokenizer: The policy's.
        model: The other model.
        config: Of the run.
        flag: It named that model.

    Raises:
        ConfigError: It does not.
    """
    from raytune_rl.models import load

    path, trust = load.resolve_path(model, use_hf=config.use_hf), config.trust_remote_code
    theirs = load.load_tokenizer(path, trust_remote_code=trust).get_vocab()
    places = load.load_config(path, trust_remote_code=trust).get_text_config().vocab_size
    added, taken = tokenizer.get_added_vocab(), set(theirs.values())
    for piece, number in tokenizer.get_vocab().items():
        known = theirs.get(piece)
        has_place = number < places and number not in taken
        if known == number or (known is None and piece in added and has_place):
            continue
        there = "none there" if known is None else f"number {known} there"
        raise ConfigError(
            f"{flag} {model} has another vocabulary than --model {config.model}: the piece {piece!r}, number "
            f"{number} here, is {there}, so the same token means something else to it. Take a model of the "
            "same family."
        )


def refuse_demonstrations(config: RLHFConfig) -> None:
    """A teacher that is asked something else is asked about the policy's own answers.

    Raises:
        ConfigError: Some generations are the answers of the data.
    """
    if config.demonstrates:
        raise ConfigError(
            f"--lmbda {config.lmbda:g} trains on answers of the data too, but the column {TEACHER_PROMPT!r} "
            "says what a teacher sees beside the policy's own: use --lmbda 1, or leave the column out."
        )


def teacher_of_rows(
    extra: Mapping[str, Sequence[Any]], column: str, teachers: Sequence[str]
) -> NDArray[np.float64]:
    """The number of each row's teacher, float64 `[n]`.

    Args:
        extra: The data's columns.
        column: It has the teacher, by number or as in `teachers`.
        teachers: `--teacher_model`.

    Raises:
        ConfigError: The data has no such column, or a row names nobody.
    """
    if column not in extra:
        raise ConfigError(
            f"--teacher_column {column}: the data has no such column, only {', '.join(sorted(extra))}."
        )
    numbers = {**{str(number): number for number in range(len(teachers))}}
    numbers |= {name: number for number, name in enumerate(teachers)}
    found = [numbers.get(str(value)) for value in extra[column]]
    if None in found:
        row = found.index(None)
        raise ConfigError(
            f"--teacher_column {column}: row {row + 1} of the prompts has {extra[column][row]!r}, which is "
            f"none of the {len(teachers)} teachers: write its number, from 0, or its name as in "
            "--teacher_model."
        )
    return np.array(found, dtype=np.float64)


def quarantine_dropped(dropped: Any, path: Path, held: set[tuple[str, int]] | None = None) -> Path | None:
    """Adds rows that were left out while encoding to the quarantine file, each once.

    Args:
        dropped: The rows.
        path: The file.
        held: Places of rows that it has already, to be added to.

    Returns:
        The file, if there are any.
    """
    held = set() if held is None else held
    lines = []
    for drop in dropped:
        if (drop.source, drop.line) not in held:
            held.add((drop.source, drop.line))
            reason = f"{drop.reason}: {drop.detail}".rstrip(": ")
            lines.append({"source": drop.source, "line": drop.line, "reason": reason})
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(redact_texts(line), ensure_ascii=False) + "\n" for line in lines)
    return path if dropped else None


def _quarantines(config: TrainConfig, quarantine: Path) -> tuple[Path, Path]:
    """For the rows to train on and for the held-out ones, which may come from the same data."""
    return quarantine, quarantine.with_name("quarantine-val.jsonl") if config.val_dataset else quarantine


def _load(config: TrainConfig, task: Task, quarantine: Path, tell: Tell = lambda _: None) -> tuple[Any, Any]:
    """(examples, report) to train on, and held out or None."""
    from raytune_rl.data.load import load_examples, split_examples
    from raytune_rl.data.rules import Identity

    def load(specs: Any, shuffle: bool, path: Path) -> Any:
        return load_examples(
            specs,
            task=task,
            system=config.system,
            columns=config.columns,
            strict=config.strict,
            shuffle=shuffle,
            seed=config.data_seed,
            quarantine_path=path,
            use_hf=config.use_hf,
            identity=Identity(config.model_name, config.model_author),
            progress=progress,
        )

    progress = RowProgress("read", tell)
    train = load(config.dataset, config.dataset_shuffle, quarantine)
    if unused := _unused_identity(config):
        train = replace(train, report=replace(train.report, notices=(unused, *train.report.notices)))
    if config.val_dataset:
        held_out = load(config.val_dataset, False, _quarantines(config, quarantine)[1])
        return (train.examples, train.report), (held_out.examples, held_out.report)
    examples, rest = split_examples(train.examples, config.split_dataset_ratio, config.data_seed)
    return (examples, train.report), (rest, train.report) if rest else None


def _unused_identity(config: TrainConfig) -> str | None:
    """A sentence where a name or author was given, and no data set asks for it."""
    from raytune_rl.data.picks import leaves_identity_open
    from raytune_rl.data.specs import parse_spec

    if not (config.model_name or config.model_author):
        return None
    if any(
        leaves_identity_open(parse_spec(text, use_hf=config.use_hf))
        for text in (*config.dataset, *config.val_dataset)
    ):
        return None
    return (
        "--model_name and --model_author have no effect: no data set leaves them open, as self-cognition does"
    )


def _account(report: Any, encoded: Any, facts: ModelFacts, quarantine: Path | None) -> Account:
    from raytune_rl.data.chat import ChatTemplate
    from raytune_rl.data.media_table import count_media

    chat = ChatTemplate.of(facts.tokenizer) if facts.media is None else facts.media.chat
    if facts.tokens is not None:
        chat = replace(chat, eos_token_ids=facts.tokens.eos)
    return Account(
        report.sources,
        dict(encoded.reasons),
        None if quarantine is None else str(quarantine),
        (*report.notices, *encoded.notices),
        facts.max_positions,
        tuple(chat.stop_token_ids()),
        facts.takes_media,
        count_media(encoded.media),
        () if facts.media is None else facts.media.placeholder_ids,
        traits=facts.traits,
    )
