"""PPO in one process, for tests: the product's estimates, losses and scalar head, without Ray.

What the workers do with columns in the object store is done here in memory, by the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytune_rl.algorithms.aggregation import row_weights
from raytune_rl.algorithms.losses.ppo import ValueSettings
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.config import PPOConfig, resolved
from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.read_rows import ReadRows
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.weights import save_model
from raytune_rl.pipelines.online_algorithms import algorithm_of
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.model import ModelSpec
from raytune_rl.protocol.rows import RowPointer, TrainBatch
from raytune_rl.protocol.train import EstimateSettings
from raytune_rl.tiny.arithmetic import Problem
from raytune_rl.workers.estimates import estimate, reward_moments, whitened
from raytune_rl.workers.scoring import forward_inputs, load
from tests.learning.loop import Policy, Spoiled


class Critic:
    """The policy's weights with a head of one output."""

    def __init__(self, policy: Policy, directory: Path) -> None:
        save_model(policy.model, directory, policy.tokenizer)
        self.scorer = ScalarScorer(load(ModelSpec(str(directory), "float32", None, "padded"), "values").model)

    def values(self, micro: MicroBatch) -> Tensor:
        return self.scorer(**forward_inputs(micro, "values"))


def columns_of(flat: Tensor, lengths: Sequence[int]) -> Ragged:
    return Ragged.from_rows([part.numpy() for part in flat.detach().split(list(lengths))], np.float32)


def read(held: dict[str, Columns], count: int) -> ReadRows:
    pointers = {name: [RowPointer(name, row) for row in range(count)] for name in held}
    rows = next(iter(pointers.values()))
    batch = TrainBatch(rows, np.ones(len(rows), dtype=np.int64), pointers).message()
    return ReadRows(batch, [held[ref] for ref in batch.refs])


def reinforce_with_critic(
    policy: Policy,
    critic: Critic,
    config: PPOConfig,
    problems: Sequence[Problem],
    generations: int,
    prompts: int,
    spoiled: Spoiled | None = None,
) -> list[dict[str, float]]:
    """Runs generations of `prompts` prompts each; returns the metrics of every optimizer step."""
    change = (spoiled or Spoiled()).advantages
    algorithm = algorithm_of(config)
    loss, critics_loss = get_loss(algorithm.loss.name), get_loss("ppo_value")
    settings = loss.settings_type(**algorithm.loss.settings)
    constants = EstimateSettings(config.kl_coef, config.gamma, config.lam)
    optimizers = [
        torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0)
        for model, rate in (
            (policy.model, resolved.learning_rate(config)),
            (critic.scorer, resolved.critic_learning_rate(config)),
        )
    ]
    reference = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    history = []
    for generation in range(generations):
        asked = [problems[(generation * prompts + k) % len(problems)] for k in range(prompts)]
        made = policy.sample(asked, config.num_generations, config.max_completion_length)
        per = [p for p in asked for _ in range(config.num_generations)]
        scores = np.array(
            [float(text == p.completion(p.answer)) for p, text in zip(per, made.texts, strict=True)]
        )
        count, lengths = len(per), made.lengths
        micro = collate(made.tokens, made.masks, layout="padded", pad_token_id=0)
        present = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
        with torch.no_grad():
            old, row_of = policy.score(made.tokens, made.masks)
            policy.model.load_state_dict(reference)
            ref, _ = policy.score(made.tokens, made.masks)
            policy.model.load_state_dict(present)
            values = critic.values(micro)
        held: dict[str, Columns] = {
            "old_logprobs": {"logprobs": columns_of(old, lengths)},
            "ref_logprobs": {"logprobs": columns_of(ref, lengths)},
            "values": {"values": columns_of(values, lengths)},
        }
        rows = read(held, count)
        moments = reward_moments(rows, scores, constants) if config.whiten_rewards else None
        facts, found = estimate(rows, scores, constants, moments)
        _, white = whitened(read({"advantages": found}, count), scores, facts.advantages)
        advantages = torch.from_numpy(change(white["advantages"].values))  # type: ignore[union-attr]
        returns = torch.from_numpy(found["returns"].values)  # type: ignore[union-attr]
        weights = torch.from_numpy(row_weights(lengths, algorithm.loss.normaliser))[row_of]
        policy.model.train()
        for _ in range(config.num_iterations):
            logprobs, _ = policy.score(made.tokens, made.masks)
            columns: dict[str, Any] = {"old_logprobs": old, "rollout_logprobs": old}
            ours = loss(LossInputs(logprobs, row_of, count, settings, columns, advantages))
            columns = {"old_values": values, "returns": returns}
            limits = ValueSettings(config.cliprange_value)
            none = torch.empty(0)
            theirs = critics_loss(
                LossInputs(none, row_of, count, limits, columns, values=critic.values(micro))
            )
            for optimizer, output, model in zip(
                optimizers, (ours, theirs), (policy.model, critic.scorer), strict=True
            ):
                optimizer.zero_grad()
                output.total(weights, None).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            errors = facts.errors.std**2 / facts.returns.std**2
            history.append({"reward": scores.mean(), "unexplained": errors, **theirs.metrics.result()})
    return history
