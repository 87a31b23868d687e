"""The rows of a data set as prompts, in a task on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytune_rl.config import InferConfig
from raytune_rl.data.formats import LABELS
from raytune_rl.errors import DataError


@dataclass(frozen=True)
class Asked:
    """The rows in words, for the file of answers.

    Attributes:
        lengths: Tokens of each prompt, int64 `[n]`.
        conversations: Messages of each row as plain dicts, without the answer.
        labels: The answer in the data, or None.
        stop_token_ids: Tokens that end an assistant's turn.
        notices: Sentences for the user.
    """

    lengths: Any
    conversations: list[list[dict[str, Any]]]
    labels: list[str | None]
    stop_token_ids: tuple[int, ...]
    notices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.conversations)


def encode_rows_task(config: InferConfig, model: str, system: str | None) -> tuple[Any, Asked]:
    """Prompt columns and what they say; see `Asked`.

    Raises:
        DataError: A row cannot be used, or has images.
    """
    from raytune_rl.data.chat import ChatTemplate
    from raytune_rl.data.encode import encode_prompts
    from raytune_rl.data.load import load_examples
    from raytune_rl.models.load import load_tokenizer

    loaded = load_examples(
        config.val_dataset,
        task="infer",
        system=system,
        columns=config.columns,
        strict=config.strict,
        shuffle=False,
        seed=config.seed,
        use_hf=config.use_hf,
    )
    for example in loaded.examples:
        if example.has_media:
            raise DataError(
                f"{example.source}:{example.line}: the row has images, which infer cannot take yet"
            )
    tokenizer = load_tokenizer(model, trust_remote_code=config.trust_remote_code)
    found = encode_prompts(
        loaded.examples, tokenizer, None, "left", strict=config.strict, num_proc=config.dataset_num_proc
    )
    kept = [loaded.examples[i] for i in found.index]
    left_out = loaded.report.bad + len(found.dropped)
    notices = [*loaded.report.notices, *found.notices]
    notices += [f"{left_out} rows cannot be used and are left out (--strict false)"] if left_out else []
    return {"prompt": found.prompts}, Asked(
        found.prompts.lengths,
        [[message.for_template() for message in example.messages] for example in kept],
        [example.extra.get(LABELS) for example in kept],
        ChatTemplate.of(tokenizer).stop_token_ids(),
        tuple(notices),
    )
