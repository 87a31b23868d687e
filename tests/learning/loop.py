"""GRPO in one process, for tests: the product's data, scorer, losses, advantages and weights, without Ray.

What the controller does through actors is done here by calls: sample (Transformers instead of vLLM), reward,
compare, weigh, step. Which loss, with which settings, comes from flags by `algorithm_of`, as in the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_rl.algorithms.advantages import group_advantages
from raytune_rl.algorithms.aggregation import lengths_in_loss, row_weights
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.config import RLHFConfig
from raytune_rl.data.collate import collate
from raytune_rl.data.encode import encode_prompts, encode_sft
from raytune_rl.data.example import Example, Message
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.tiny.arithmetic import Problem, question


@dataclass(frozen=True)
class Sampled:
    """Completions of some prompts, `per` of each; all prompts have one length."""

    tokens: list[np.ndarray]
    masks: list[np.ndarray]
    texts: list[str]
    truncated: list[bool]

    @property
    def lengths(self) -> list[int]:
        return [int(mask.sum()) for mask in self.masks]


class Policy:
    """A tiny model with its tokenizer."""

    def __init__(self, path: Path) -> None:
        from raytune_rl.models.load import load_model, load_tokenizer

        self.model = load_model(str(path), dtype="float32").model
        self.tokenizer: Any = load_tokenizer(str(path))
        self.scorer = TokenScorer(self.model)
        self.end = int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def prompts(self, problems: Sequence[Problem], hint: str = "") -> list[np.ndarray]:
        rows = [
            Example((Message("user", question(p, in_words=False) + hint.format(p.answer)),)) for p in problems
        ]
        found = encode_prompts(rows, self.tokenizer, None, "left").prompts
        return [found[i].copy() for i in range(len(found))]

    def sample(self, problems: Sequence[Problem], per: int, limit: int) -> Sampled:
        prompts = [prompt for prompt in self.prompts(problems) for _ in range(per)]
        ids = torch.from_numpy(np.stack(prompts)).long()
        self.model.eval()
        with torch.no_grad():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=limit,
                eos_token_id=self.end,
                pad_token_id=self.end,
            )[:, ids.shape[1] :].numpy()
        tokens, masks, texts, truncated = [], [], [], []
        for prompt, completion in zip(prompts, made, strict=True):
            ends = np.flatnonzero(completion == self.end)
            kept = completion[: ends[0] + 1] if len(ends) else completion
            tokens.append(np.concatenate([prompt, kept]))
            masks.append(np.arange(len(prompt) + len(kept)) >= len(prompt))
            texts.append(self.tokenizer.decode(kept, skip_special_tokens=True))
            truncated.append(not len(ends))
        return Sampled(tokens, masks, texts, truncated)

    def score(self, tokens: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Log-probs of the loss tokens, and the row of each."""
        micro = collate(tokens, masks, layout="padded", pad_token_id=0)
        scored = self.scorer(
            micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index, micro.targets
        )
        return scored.logprobs, micro.row_of

    def imitate(
        self,
        problems: Sequence[Problem],
        answers: Sequence[int],
        steps: int,
        rate: float,
        hints: Sequence[str] | None = None,
    ) -> None:
        """The warm-up: cross-entropy on a teacher's completions, 64 rows a step; `hints` stand behind the
        questions.
        """
        rows = [
            Example((Message("user", question(p, in_words=False) + h), Message("assistant", p.completion(a))))
            for p, a, h in zip(problems, answers, hints or [""] * len(problems), strict=True)
        ]
        found = encode_sft(rows, self.tokenizer, None, "delete", "default")
        optimizer = torch.optim.AdamW(self.model.parameters(), rate, betas=(0.9, 0.95))
        rng = np.random.default_rng(0)
        self.model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
            chosen = rng.integers(len(rows), size=64)
            logprobs, _ = self.score([found.tokens[i] for i in chosen], [found.loss_mask[i] for i in chosen])
            optimizer.zero_grad()
            (-logprobs.mean()).backward()
            optimizer.step()

    def rightness(self, problems: Sequence[Problem], hint: str = "") -> float:
        """The expected reward on problems: the mean probability of the right completion. No sampling, no
        noise. A `hint` stands behind each question, with the answer in the place of its braces.
        """
        prompts = self.prompts(problems, hint)
        rows = []
        for prompt, p in zip(prompts, problems, strict=True):
            answer = self.tokenizer.encode(p.completion(p.answer), add_special_tokens=False)
            rows.append((prompt, np.asarray([*answer, self.end])))
        tokens = [np.concatenate(row) for row in rows]
        masks = [np.arange(len(prompt) + len(rest)) >= len(prompt) for prompt, rest in rows]
        self.model.eval()
        with torch.no_grad():
            logprobs, row_of = self.score(tokens, masks)
        sums = torch.zeros(len(rows)).index_add(0, row_of, logprobs)
        return float(sums.exp().mean())


@dataclass
class Spoiled:
    """Ways to break the loop, for tests that it would be noticed."""

    advantages: Callable[[np.ndarray], np.ndarray] = field(default=lambda a: a)
    masks: Callable[[np.ndarray], np.ndarray] = field(default=lambda m: m)


def reinforce(
    policy: Policy,
    config: RLHFConfig,
    problems: Sequence[Problem],
    generations: int,
    prompts: int,
    spoiled: Spoiled | None = None,
) -> list[dict[str, float]]:
    """Runs generations of `prompts` prompts each; returns the metrics of every optimizer step."""
    spoiled = spoiled or Spoiled()
    algorithm = algorithm_of(config)
    loss = get_loss(algorithm.loss.name)
    settings = loss.settings_type(**algorithm.loss.settings)
    optimizer = torch.optim.AdamW(
        policy.model.parameters(), config.learning_rate or 1e-4, betas=(0.9, 0.95), weight_decay=0.0
    )
    history = []
    for generation in range(generations):
        asked = [problems[(generation * prompts + k) % len(problems)] for k in range(prompts)]
        made = policy.sample(asked, config.num_generations, config.max_completion_length)
        groups = np.repeat(np.arange(prompts), config.num_generations)
        rewards = [
            float(text == asked[g].completion(asked[g].answer))
            for g, text in zip(groups, made.texts, strict=True)
        ]
        grouped = group_advantages(
            rewards, groups, config.scale_rewards, estimator=config.advantage_estimator
        )
        advantages = spoiled.advantages(grouped.advantages)
        masks = [spoiled.masks(mask) for mask in made.masks]
        lengths = lengths_in_loss([int(mask.sum()) for mask in masks], made.truncated, config.overlong_filter)
        weights = torch.from_numpy(
            row_weights(lengths, algorithm.loss.normaliser, config.max_completion_length)
        )
        with torch.no_grad():
            old, row_of = policy.score(made.tokens, masks)
        policy.model.train()
        for _ in range(config.num_iterations):
            logprobs, _ = policy.score(made.tokens, masks)
            columns = {"old_logprobs": old, "rollout_logprobs": old, "ref_logprobs": old}
            spread = torch.from_numpy(advantages)[row_of]
            output = loss(LossInputs(logprobs, row_of, len(masks), settings, columns, spread))
            optimizer.zero_grad()
            output.total(weights[row_of], None).backward()
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimizer.step()
            history.append({"reward": float(np.mean(rewards)), **output.metrics.result()})
    return history
