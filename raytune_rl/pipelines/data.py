"""Data for the pipelines: prepared in a Ray task, so that token arrays never pass through the driver.

The task reads, understands and tokenizes; the columns stay in the object store and the driver gets lengths
and an account of every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_rl.config import RLHFConfig, SFTConfig, resolved
from raytune_rl.data.rows import RowPointer
from raytune_rl.errors import ConfigError
from raytune_rl.runtime.wait import Pending, fetch


@dataclass(frozen=True)
class SourceCounts:
    """One data set in numbers."""

    name: str
    rows: int
    bad: int
    taken: int


@dataclass(frozen=True)
class Account:
    """What became of every row of the data.

    Attributes:
        sources: The data sets.
        dropped: Reason -> rows left out while encoding, such as too long.
        quarantine: File with the bad rows, if there are any.
        notices: Sentences for the user.
        max_positions: Longest sequence the model takes, tokens; None if it does not say.
        stop_token_ids: Tokens that end an assistant's turn in the model's chat template.
    """

    sources: tuple[SourceCounts, ...]
    dropped: dict[str, int]
    quarantine: str | None
    notices: tuple[str, ...]
    max_positions: int | None
    stop_token_ids: tuple[int, ...]

    @property
    def bad(self) -> int:
        """Rows in quarantine."""
        return sum(source.bad for source in self.sources)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the object store.

    Attributes:
        columns: Reference to {"prompt": Ragged int32}.
        extra: Reference to the data set's other columns, one entry a prompt, for the rewards.
        texts: Reference to the prompts as text, for the completion log.
        lengths: Tokens of each prompt, int64 `[n]`.
        account: What became of the rows.
    """

    columns: Any
    extra: Any
    texts: Any
    lengths: NDArray[np.int64]
    account: Account

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class TokenSet:
    """Tokenized conversations in the object store.

    Attributes:
        columns: Reference to {"tokens": Ragged int32, "loss_mask": Ragged bool}.
        lengths: Tokens of each row, int64 `[n]`.
        loss_lengths: Of those, the ones trained on, int64 `[n]`.
        account: What became of the rows.
    """

    columns: Any
    lengths: NDArray[np.int64]
    loss_lengths: NDArray[np.int64]
    account: Account

    def __len__(self) -> int:
        return len(self.lengths)

    def pointer(self, row: int) -> RowPointer:
        """Where a row lies."""
        return RowPointer(self.columns, row)


def prompt_sets(config: RLHFConfig, quarantine: Path) -> tuple[PromptSet, PromptSet | None]:
    """The prompts to train on, and the held-out ones if the user gave any."""
    refs = _remotely(_encode_prompts, 8).remote(config, str(quarantine))
    train, held_out = refs[:4], refs[4:]
    return _prompt_set(train, config), _prompt_set(held_out, config) if _has_rows(
        held_out[3], config
    ) else None


def token_sets(config: SFTConfig, quarantine: Path) -> tuple[TokenSet, TokenSet | None]:
    """The conversations to train on, and the held-out ones if the user gave any."""
    refs = _remotely(_encode_sft, 4).remote(config, str(quarantine))
    train, held_out = refs[:2], refs[2:]
    return _token_set(train, config), _token_set(held_out, config) if _has_rows(held_out[1], config) else None


def check_lengths(longest_prompt: int, completion: int, limit: int | None, max_positions: int | None) -> int:
    """The engine's sequence limit: what the user set, else what the run needs.

    Raises:
        ConfigError: The longest prompt and completion do not fit the limit or the model.
    """
    needed = longest_prompt + completion
    if limit is not None and needed > limit:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and --max_completion_length is {completion}, "
            f"together {needed}, "
            f"but --vllm_max_model_len is {limit}. Raise it, or cut prompts with --max_length "
            f"{limit - completion}."
        )
    if max_positions is not None and needed > max_positions:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and --max_completion_length is {completion}, "
            f"together {needed}, "
            f"but the model takes {max_positions}. Lower --max_completion_length, or cut prompts with "
            "--max_length."
        )
    return limit or needed


def _remotely(function: Any, returns: int) -> Any:
    """A task on the driver's own node, where the user's paths mean what the user thinks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(function).options(
        num_cpus=0, num_returns=returns, scheduling_strategy=here, max_retries=0
    )


def _wait(ref: Any, config: RLHFConfig | SFTConfig) -> Any:
    return fetch(Pending(ref, "the data task", "reading and tokenizing the data", config.step_timeout))


def _has_rows(ref: Any, config: RLHFConfig | SFTConfig) -> bool:
    return _wait(ref, config) is not None


def _prompt_set(refs: list[Any], config: RLHFConfig) -> PromptSet:
    columns, extra, texts, facts = refs
    lengths, account = _wait(facts, config)
    return PromptSet(columns, extra, texts, lengths, account)


def _token_set(refs: list[Any], config: SFTConfig) -> TokenSet:
    columns, facts = refs
    lengths, loss_lengths, account = _wait(facts, config)
    return TokenSet(columns, lengths, loss_lengths, account)


# -- what runs in the task ----------------------------------------------------------------------------------


def _encode_prompts(config: RLHFConfig, quarantine: str) -> tuple[Any, ...]:
    from raytune_rl.data.encode import encode_prompts

    tokenizer, max_positions = _model_facts(config)

    def encode(examples: Any, report: Any) -> tuple[Any, ...]:
        found = encode_prompts(
            examples,
            tokenizer,
            config.max_length,
            resolved.truncation_strategy(config),  # type: ignore[arg-type]
            strict=config.strict,
            num_proc=config.dataset_num_proc,
        )
        rows = found.prompts
        texts = tokenizer.batch_decode([rows[i].tolist() for i in range(len(rows))])
        facts = (rows.lengths, _account(report, found, max_positions, tokenizer))
        return {"prompt": rows}, found.extra, texts, facts

    train, held_out = _load(config, "grpo", Path(quarantine))
    return (*encode(*train), *(encode(*held_out) if held_out else (None,) * 4))


def _encode_sft(config: SFTConfig, quarantine: str) -> tuple[Any, ...]:
    from raytune_rl.data.encode import encode_sft

    tokenizer, max_positions = _model_facts(config)

    def encode(examples: Any, report: Any) -> tuple[Any, ...]:
        found = encode_sft(
            examples,
            tokenizer,
            config.max_length,
            resolved.truncation_strategy(config),  # type: ignore[arg-type]
            config.loss_scale,
            strict=config.strict,
            num_proc=config.dataset_num_proc,
        )
        counts = np.add.reduceat(found.loss_mask.values.astype(np.int64), found.loss_mask.offsets[:-1])
        facts = (found.tokens.lengths, counts, _account(report, found, max_positions, tokenizer))
        return {"tokens": found.tokens, "loss_mask": found.loss_mask}, facts

    train, held_out = _load(config, "sft", Path(quarantine))
    return (*encode(*train), *(encode(*held_out) if held_out else (None,) * 2))


def _model_facts(config: RLHFConfig | SFTConfig) -> tuple[Any, int | None]:
    """The tokenizer, and the longest sequence the model takes."""
    from raytune_rl.models.load import load_config, load_tokenizer, resolve_path

    assert config.model is not None
    path = resolve_path(config.model, use_hf=config.use_hf)
    model = load_config(path, trust_remote_code=config.trust_remote_code)
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    return load_tokenizer(path, trust_remote_code=config.trust_remote_code), positions


def _load(config: RLHFConfig | SFTConfig, task: Any, quarantine: Path) -> tuple[Any, Any]:
    """(examples, report) to train on, and held out or None."""
    from raytune_rl.data.load import load_examples, split_examples

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
        )

    train = load(config.dataset, config.dataset_shuffle, quarantine)
    if config.val_dataset:
        held_out = load(config.val_dataset, False, quarantine.with_name("quarantine-val.jsonl"))
        return (train.examples, train.report), (held_out.examples, held_out.report)
    examples, rest = split_examples(train.examples, config.split_dataset_ratio, config.data_seed)
    return (examples, train.report), (rest, train.report) if rest else None


def _account(report: Any, encoded: Any, max_positions: int | None, tokenizer: Any) -> Account:
    from raytune_rl.data.chat import ChatTemplate

    return Account(
        tuple(SourceCounts(s.name, s.rows, s.bad, s.taken) for s in report.sources),
        dict(encoded.reasons),
        None if report.quarantine_path is None else str(report.quarantine_path),
        (*report.notices, *encoded.notices),
        max_positions,
        tuple(ChatTemplate.of(tokenizer).stop_token_ids()),
    )
