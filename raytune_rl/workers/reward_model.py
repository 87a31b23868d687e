"""The reward model worker: scores completions with classifiers of one output, or by what a language model
says of them. Stateless.

A completion is judged as the last turn of its conversation, written with the reward model's own chat template
and tokenized with its own tokenizer: exactly as the rows that it was trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.protocol.model import ModelSpec
from raytune_rl.protocol.rewards import Failure, RewardModelSpec, Scores, TrainerState
from raytune_rl.protocol.rows import RowsOf
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.workers import scoring
from raytune_rl.workers.probed import Probed

DEFAULT = "default"
"""The plugin that takes a classifier's score of the whole conversation."""


class RewardModelWorker(Probed):
    """Holds every reward model of the run.

    Raises:
        ModelError: One cannot be loaded, or is not a reward model: it has no head that gives one score.
        RewardError: A plugin cannot be loaded.
    """

    def __init__(self, spec: RewardModelSpec) -> None:
        self._spec = spec
        plugins = spec.plugins or (DEFAULT,) * len(spec.models)
        if any(plugin != DEFAULT for plugin in plugins):
            load_plugins(spec.plugin_files)
        self._models: list[_Classifier | _Judged] = [
            _Classifier(model, spec.max_tokens)
            if plugin == DEFAULT
            else _Judged(model, plugin, spec.max_tokens)
            for model, plugin in zip(spec.models, plugins, strict=True)
        ]

    def ping(self) -> tuple[str, ...]:
        """Proves that the models are loaded; what there is to say of them."""
        return tuple(notice for model in self._models for notice in model.notices)

    def score(
        self,
        texts: RowsOf,
        columns: Sequence[Any],
        column_rows: Sequence[int],
        dialogues: RowsOf | None = None,
        state: TrainerState | None = None,
    ) -> Scores:
        """Scores completions.

        Args:
            texts: Where they lie, in lists of str.
            columns: `[ObjectRef]` of the prompts' columns; "messages" is read, and "tools" if it is there. A
                plugin sees them all.
            column_rows: Of each completion, the prompt it belongs to.
            dialogues: Of conversations of several turns, where their messages lie.
            state: How far the run has come, for plugins.

        Returns:
            The scores, one row a completion; NaN, and a failure with the reason, where a model
            cannot read the conversation.
        """
        several_turns = () if dialogues is None else dialogues.refs
        refs = [columns[0], *texts.refs, *several_turns]
        prompts, *found = ray.get(refs, timeout=self._spec.timeout_s)
        completions = [found[number][row] for number, row in texts.places]
        talks = [] if dialogues is None else found[len(texts.refs) :]
        said = [] if dialogues is None else [talks[number][row] for number, row in dialogues.places]
        conversations: list[dict[str, Any]] = []
        for row, (completion, prompt) in enumerate(zip(completions, column_rows, strict=True)):
            row_columns = {name: column[prompt] for name, column in prompts.items()}
            answer = {"role": "assistant", "content": completion}
            turns = said[row]["messages"] if said else [*row_columns["messages"], answer]
            conversations.append({**row_columns, "messages": turns})
        return self.judge(conversations, state)

    def empty_cache(self) -> None:
        """Gives back what the allocator keeps, to those that share its GPU."""
        from raytune_rl.workers.offload import empty_cache

        empty_cache()

    def judge(self, conversations: Sequence[Mapping[str, Any]], state: TrainerState | None = None) -> Scores:
        """Scores conversations that end with the assistant: "messages", and what else the row has."""
        values, failures, seconds = [], [], []
        for name, label, model in zip(self._names(), self._spec.labels, self._models, strict=True):
            started = time.perf_counter()
            model_values, reasons = model.score(conversations, state)
            values.append(model_values)
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
        from raytune_rl.data.model_tokens import ModelTokens
        from raytune_rl.models.load import load_tokenizer
        from raytune_rl.models.tuner import apply_tuner
        from raytune_rl.protocol.model import TunerSettings
        from raytune_rl.workers import isolation

        name, spec = spec.path, with_base(local(spec))
        loaded = scoring.load(spec, "scores")
        model: Any = loaded.model
        self.notices = loaded.notices
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), spec.adapters, resize=True).model
        if loaded.new_head and not spec.adapters:
            raise _no_reward_model(name)
        self._scorer = scoring.scorer_of(model, "scores").eval().requires_grad_(False)
        isolation.settle(self._scorer, "padded")
        home = spec.adapters[0] if spec.adapters and _has_tokenizer(spec.adapters[0]) else loaded.path
        tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
        # As training writes a conversation, its end included.
        chat = replace(ChatTemplate.of(tokenizer), eos_token_ids=ModelTokens.of(home, model.config).eos)
        self._job = Job(chat, None, "delete", "all")
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._max_tokens = max_tokens

    def score(
        self, conversations: Sequence[Mapping[str, Any]], state: TrainerState | None = None
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Scores, float64 `[n]`, and why a row has none."""
        import torch

        from raytune_rl.data.collate import collate
        from raytune_rl.data.encode_rows import Failure as Unreadable
        from raytune_rl.data.encode_rows import encode_chunk
        from raytune_rl.data.example import Example, Message
        from raytune_rl.data.microbatch import plan_micro_batches

        examples = [
            Example(
                tuple(Message(turn["role"], turn["content"]) for turn in one["messages"]),
                tools=tuple(one.get("tools") or ()),
            )
            for one in conversations
        ]
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
        readable = list(tokens)
        lengths = [len(tokens[number]) for number in readable]
        plan = plan_micro_batches(lengths, world_size=1, max_tokens=self._max_tokens, layout="padded")
        for members in plan.ranks[0]:
            micro_tokens = [tokens[readable[member]] for member in members]
            masks = [np.zeros(len(row), dtype=np.bool_) for row in micro_tokens]
            micro = collate(micro_tokens, masks, layout="padded", pad_token_id=scoring.PAD).to(
                scoring.device()
            )
            with torch.no_grad():
                scores = self._scorer(**scoring.forward_inputs(micro, "scores")).cpu().numpy()
            values[[readable[member] for member in members]] = scores
        return values, reasons


class _Judged:
    """One model with the plugin that asks it."""

    def __init__(self, spec: ModelSpec, plugin: str, max_tokens: int) -> None:
        from raytune_rl.models.load import load_tokenizer
        from raytune_rl.models.tuner import apply_tuner
        from raytune_rl.protocol.model import TunerSettings
        from raytune_rl.workers.judge import Judge, is_classifier

        spec = local(spec)
        scalar = is_classifier(spec.path)
        spec = with_base(spec, scores=scalar)
        loaded = scoring.load(spec, "scores" if scalar else "logprobs")
        model: Any = loaded.model
        if spec.adapters:
            model = apply_tuner(model, TunerSettings(lora_dropout=0.0), spec.adapters, resize=True).model
        self.notices = loaded.notices
        home = spec.adapters[0] if spec.adapters and _has_tokenizer(spec.adapters[0]) else loaded.path
        tokenizer = load_tokenizer(home, trust_remote_code=spec.trust_remote_code)
        self._judge = Judge(plugin, model.eval().requires_grad_(False), tokenizer, max_tokens)

    def score(
        self, conversations: Sequence[Mapping[str, Any]], state: TrainerState | None = None
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Scores, float64 `[n]`, and why a row has none."""
        return self._judge.score([dict(one) for one in conversations], state)


def local(spec: ModelSpec) -> ModelSpec:
    """The spec with a folder on this machine, where it named a hub's model or adapter."""
    from raytune_rl.models.hub import resolve_path

    return replace(spec, path=resolve_path(spec.path, use_hf=spec.use_hf))


def with_base(spec: ModelSpec, *, scores: bool = True) -> ModelSpec:
    """The spec of an adapter's base with the adapter on it, which brings a head if it `scores`; any other
    spec as it is.

    Raises:
        ConfigError: The adapter does not name its base.
        ModelError: The adapter is not a reward model's.
    """
    file = Path(spec.path).expanduser() / "adapter_config.json"
    if not file.is_file():
        return spec
    adapter = json.loads(file.read_text(encoding="utf-8"))
    if scores and adapter.get("task_type") != "SEQ_CLS":
        raise _no_reward_model(spec.path)
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{file} does not name the model that the adapter goes on; merge it with export")
    return replace(spec, path=base, adapters=(str(file.parent),))


def _no_reward_model(path: str) -> ModelError:
    return ModelError(
        f"'{path}' is not a reward model: it has no head that gives one score. Train one with "
        "raytune-rl rlhf --rlhf_type rm, or ask a language model with --reward_model_plugin genrm"
    )


def _has_tokenizer(directory: str) -> bool:
    return (Path(directory) / "tokenizer_config.json").is_file()
