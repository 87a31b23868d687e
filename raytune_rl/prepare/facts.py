"""What data depend on in a model, and what a run is told of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_rl.config.commands import TrainConfig
from raytune_rl.data.model_tokens import ModelTokens
from raytune_rl.protocol.data import Account
from raytune_rl.protocol.model import Traits
from raytune_rl.runtime.imports import import_once


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


def model_facts(config: TrainConfig) -> ModelFacts:
    """Reads a model's config and tokenizer, and of a model that takes media the processor."""
    import_once("raytune_rl.models.load")
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


def account_of(report: Any, encoded: Any, facts: ModelFacts, quarantine: Path | None) -> Account:
    """What became of a set's rows, and what the rest of a run has to know of its model."""
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
