"""The reward model worker: scores completions with classifiers of one output. Stateless.

A completion is judged as the last turn of its conversation, written with the reward model's own chat template
and tokenized with its own tokenizer: exactly as the rows that it was trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.rewards.types import Failure, Scores
from raytune_rl.workers import scoring
from raytune_rl.workers.scoring import ModelSpec

if TYPE_CHECKING:
    from raytune_rl.data.example import Example


@dataclass(frozen=True)
class RewardModelSpec:
    """Which reward models a worker holds.

    Attributes:
        models: What to load; a path may be the directory of an adapter, whose base is loaded with it.
        labels: A name for each, for metrics.
        max_tokens: Token budget of a pass.
        timeout_s: Deadline for reading texts from the object store, seconds.
    """

    models: tuple[ModelSpec, ...]
    labels: tuple[str, ...]
    max_tokens: int
    timeout_s: float


class RewardModelWorker:
    """Holds every reward model of the run.

    Raises:
        ModelError: One cannot be loaded, or is not a reward model: it has no head that gives one score.
    """

    def __init__(self, spec: RewardModelSpec) -> None:
        self._spec = spec
        self._models = [_Classifier(model, spec.max_tokens) for model in spec.models]

    def ping(self) -> tuple[str, ...]:
        """Proves that the models are loaded; what there is to say of them."""
        return tuple(notice for model in self._models for notice in model.notices)

    def score(
        self,
        texts: Sequence[Any],
        rows: Sequence[int],
        columns: Sequence[Any],
        column_rows: Sequence[int],
    ) -> Scores:
        """Scores the completions `rows`.

        Args:
            texts: `[ObjectRef]` of the completions, list of str.
            rows: Which of them to score, in this order.
            columns: `[ObjectRef]` of the prompts' columns; "messages" is read, and "tools" if it is there.
            column_rows: For each entry of `rows`, the prompt it belongs to.

        Returns:
            The scores, row `i` of them for `rows[i]`; NaN, and a failure with the reason, where a model
            cannot read the conversation.
        """
        from raytune_rl.data.example import Example, Message

        completions, prompts = ray.get([texts[0], columns[0]], timeout=self._spec.timeout_s)
        examples = []
        for row, prompt in zip(rows, column_rows, strict=True):
            turns = (*prompts["messages"][prompt], {"role": "assistant", "content": completions[row]})
            plain = tuple(Message(turn["role"], turn["content"]) for turn in turns)
            tools = prompts["tools"][prompt] if "tools" in prompts else ()
            examples.append(Example(plain, tools=tuple(tools or ())))
        return self.judge(examples)

    def judge(self, examples: Sequence[Example]) -> Scores:
        """Scores conversations that end with the assistant."""
        values, failures, seconds = [], [], []
        for name, label, model in zip(self._names(), self._spec.labels, self._models, strict=True):
            started = time.perf_counter()
            found, reasons = model.score(examples)
            values.append(found)
            failures += [Failure(row, label, "invalid", f"{name}: {why}") for row, why in reasons.items()]
            seconds.append(time.perf_counter() - started)
        return Scores(
            functions=self._names(),
            labels=self._spec.labels,
            values=np.stack(values, axis=1),
            failures=tuple(failures),
            seconds=tuple(seconds),
            slow_path=(None,) * len(self._models),
        )

    def _names(self) -> tuple[str, ...]:
        return tuple(model.path for model in self._spec.models)


class _Classifier:
    """One reward model with its tokenizer."""

    def __init__(self, spec: ModelSpec, max_tokens: int) -> None:
        from raytune_rl.data.chat import ChatTemplate
        from raytune_rl.data.encode_rows import Job
        from raytune_rl.models.load import load_tokenizer
        from raytune_rl.models.settings import TunerSettings
        from raytune_rl.models.tuner import apply_tuner

        name, spec = spec.path, with_base(spec)
        loaded = scoring.load(spec, "scores")
        model: Any = loaded.model
        self.notices = loaded.notices
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), spec.adapters).model
        if loaded.new_head and not spec.adapters:
            raise _no_reward_model(name)
        self._scorer = scoring.scorer_of(model, "scores").eval().requires_grad_(False)
        home = spec.adapters[0] if spec.adapters and _has_tokenizer(spec.adapters[0]) else loaded.path
        tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
        self._job = Job(ChatTemplate.of(tokenizer), None, "delete", "all")
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_tokens = max_tokens

    def score(self, examples: Sequence[Example]) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Scores, float64 `[n]`, and why a row has none."""
        import torch

        from raytune_rl.data.collate import collate
        from raytune_rl.data.encode_rows import Failure as Unreadable
        from raytune_rl.data.encode_rows import encode_chunk
        from raytune_rl.data.microbatch import plan_micro_batches

        values = np.full(len(examples), np.nan)
        reasons: dict[int, str] = {}
        tokens: dict[int, NDArray] = {}
        for number, row in enumerate(encode_chunk(self._job, examples)):
            if isinstance(row, Unreadable):
                reasons[number] = str(row)
            elif self._longest is not None and len(row.tokens) > self._longest:
                reasons[number] = f"{len(row.tokens)} tokens, and the model takes {self._longest}"
            else:
                tokens[number] = row.tokens
        there = list(tokens)
        lengths = [len(tokens[number]) for number in there]
        plan = plan_micro_batches(lengths, world_size=1, max_tokens=self._max_tokens, layout="padded")
        for members in plan.ranks[0]:
            held = [tokens[there[member]] for member in members]
            masks = [np.zeros(len(row), dtype=np.bool_) for row in held]
            micro = collate(held, masks, layout="padded", pad_token_id=scoring.PAD).to(scoring.device())
            with torch.no_grad():
                found = self._scorer(**scoring.forward_inputs(micro, "scores")).cpu().numpy()
            values[[there[member] for member in members]] = found
        return values, reasons


def with_base(spec: ModelSpec) -> ModelSpec:
    """The spec of an adapter's base with the adapter on it, which brings a head; any other spec as it is.

    Raises:
        ConfigError: The adapter does not name its base.
        ModelError: The adapter is not a reward model's.
    """
    file = Path(spec.path).expanduser() / "adapter_config.json"
    if not file.is_file():
        return spec
    adapter = json.loads(file.read_text(encoding="utf-8"))
    if adapter.get("task_type") != "SEQ_CLS":
        raise _no_reward_model(spec.path)
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{file} does not name the model that the adapter goes on; merge it with export")
    return replace(spec, path=base, adapters=(str(file.parent),))


def _no_reward_model(path: str) -> ModelError:
    return ModelError(
        f"'{path}' is not a reward model: it has no head that gives one score. Train one with "
        "raytune-rl rlhf --rlhf_type rm"
    )


def _has_tokenizer(directory: str) -> bool:
    return (Path(directory) / "tokenizer_config.json").is_file()
