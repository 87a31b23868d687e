"""The rows of a data set as prompts, in a task on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raytune_rl.config import InferConfig
from raytune_rl.data.formats import LABELS


@dataclass(frozen=True)
class Asked:
    """The rows in words, for the file of answers.

    Attributes:
        lengths: Tokens of each prompt, int64 `[n]`.
        conversations: Messages of each row as plain dicts, without the answer.
        labels: The answer in the data, or None.
        others: The other columns of each row, such as its solution.
        stop_token_ids: Tokens that end an assistant's turn.
        placeholder_ids: Tokens that stand for media: no answer may have them.
        most_media: By kind, the most that one row shows; None for a model that takes texts only.
        notices: Sentences for the user.
    """

    lengths: Any
    conversations: list[list[dict[str, Any]]]
    labels: list[str | None]
    others: list[dict[str, Any]]
    stop_token_ids: tuple[int, ...]
    placeholder_ids: tuple[int, ...]
    most_media: dict[str, int] | None
    notices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.conversations)


def encode_rows_task(config: InferConfig, model: str, home: str, system: str | None) -> tuple[Any, Asked]:
    """Prompt columns and what they say; see `Asked`. `home` is the tokenizer's folder.

    Raises:
        DataError: A row cannot be used.
    """
    from raytune_rl.data.chat import ChatTemplate
    from raytune_rl.data.encode import MediaSettings, encode_prompts
    from raytune_rl.data.load import load_examples
    from raytune_rl.data.media_table import count_media
    from raytune_rl.data.model_tokens import ModelTokens
    from raytune_rl.data.rules import Identity
    from raytune_rl.models.load import load_config

    loaded = load_examples(
        config.val_dataset,
        task="infer",
        system=system,
        columns=config.columns,
        strict=config.strict,
        shuffle=False,
        seed=config.seed,
        use_hf=config.use_hf,
        identity=Identity(config.model_name, config.model_author),
    )
    tokenizer, media = _reader(config, model, home)
    tokens = ModelTokens.of(model, load_config(model, trust_remote_code=config.trust_remote_code))
    encoded = encode_prompts(
        loaded.examples,
        tokenizer,
        None,
        "left",
        strict=config.strict,
        num_proc=config.dataset_num_proc,
        media=None if media is None else MediaSettings(media, inline=True),
        model=tokens,
    )
    chat = ChatTemplate.of(tokenizer) if media is None else media.chat
    kept = [loaded.examples[i] for i in encoded.index]
    left_out = loaded.report.bad + len(encoded.dropped)
    notices = [*loaded.report.notices, *encoded.notices]
    notices += [f"{left_out} rows cannot be used and are left out (--strict false)"] if left_out else []
    columns = {"prompt": encoded.prompts, **encoded.media}
    columns |= {} if encoded.engine_prompt_ids is None else {"engine_prompt_ids": encoded.engine_prompt_ids}
    return columns, Asked(
        encoded.prompts.lengths,
        [[message.for_template() for message in example.messages] for example in kept],
        [example.extra.get(LABELS) for example in kept],
        [{name: value for name, value in example.extra.items() if name != LABELS} for example in kept],
        replace(chat, eos_token_ids=tokens.eos).stop_token_ids(),
        () if media is None else media.placeholder_ids,
        None if media is None else count_media(encoded.media).most,
        tuple(notices),
    )


def _reader(config: InferConfig, model: str, home: str) -> tuple[Any, Any]:
    """The tokenizer, and of a model that takes media its processor."""
    from raytune_rl.data.media_processor import MediaProcessor
    from raytune_rl.models import load
    from raytune_rl.protocol.media import MediaLimits

    trust = config.trust_remote_code
    takes_media = load.takes_media(load.load_config(model, trust_remote_code=trust))
    processor = load.load_media_processor(model, trust_remote_code=trust) if takes_media else None
    if processor is None:
        return load.load_tokenizer(home, trust_remote_code=trust), None
    return processor.tokenizer, MediaProcessor.of(processor, MediaLimits.of(config))
