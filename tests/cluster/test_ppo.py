"""PPO from config to checkpoint on the real stack, with a critic, a reference and a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.config import PPOConfig, RLHFConfig
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.weights import save_model
from raytune_rl.pipelines import online, ppo
from tests.cluster.conftest import Tiny
from tests.cluster.test_online import GAP, PLUGIN, arrays_in, steps

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def reward_model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has learned nothing: its scores differ, which is all that is asked of it here."""
    directory = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(3)
    save_model(load_model(str(tiny.untied), scalar=True).model, directory, load_tokenizer(str(tiny.untied)))
    return directory


@pytest.fixture(scope="module")
def finished(cluster: None, tiny: Tiny, reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two generations of two mini-batches, each trained on twice, an epoch each; what the driver received is
    kept.
    """
    import ray

    output = tmp_path_factory.mktemp("ppo")
    (output / "plugin.py").write_text(PLUGIN)
    config = PPOConfig(
        model=str(tiny.untied),
        dataset=f"{tiny.data.train}#16",
        reward_funcs=["digits"],
        reward_model=[str(reward_model)],
        reward_weights=[1.0, 0.1],
        external_plugins=[str(output / "plugin.py")],
        train_type="full",
        per_device_train_batch_size=8,
        num_mini_batches=2,
        num_ppo_epochs=2,
        max_completion_length=12,
        learning_rate=3e-3,
        critic_learning_rate=3e-5,
        missing_eos_penalty=0.5,
        max_steps=8,
        logging_steps=1,
        save_strategy="epoch",
        output_dir=str(output / "out"),
        log_completions=True,
    )
    received: list[Any] = []
    plain = ray.get

    def watched(*args: Any, **kwargs: Any) -> Any:
        received.append(plain(*args, **kwargs))
        return received[-1]

    ray.get = watched
    try:
        return config, ppo.run(config), received
    finally:
        ray.get = plain


def test_both_learn_and_all_is_told(finished: Any) -> None:
    _, result, received = finished
    lines = steps(result)
    assert sorted(lines) == list(range(1, 9))
    for line in lines.values():
        for name in (
            "loss/policy_avg", "loss/value_avg", "grad_norm", "critic/grad_norm", "critic/value",
            "critic/explained_variance", "objective/kl", "objective/scores", "objective/rlhf_reward",
            "reward", "reward_std", "rewards/Digits/mean", "rewards/RewardModel/mean", "kl",
        ):  # fmt: skip
            assert np.isfinite(line[name]), name
        assert line["rewards/RewardModel/std"] > 0
        assert "frac_reward_zero_std" not in line
        cut_off = line["completions/clipped_ratio"]
        assert line["objective/scores"] == pytest.approx(line["reward"] - 0.5 * cut_off, abs=1e-5)
        total = line["objective/scores"] + line["objective/non_score_reward"]
        assert line["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)
    assert lines[1]["objective/kl"] == pytest.approx(0, abs=1e-4), "the policy starts as its reference"
    assert abs(lines[5]["objective/kl"]) > 1e-3, "and moves away from it"
    assert lines[1]["profiling/critic"] > 0
    assert lines[1][GAP] < 1e-4
    assert lines[5][GAP] < 1e-4, "the engine has the weights of the last step"
    assert lines[1]["clip_ratio/region_mean"] == 0
    for step in (1, 2):
        again = lines[step + 2]["loss/value_avg"]
        assert again < lines[step]["loss/value_avg"], "the critic learns the same rows"
    assert lines[1]["loss/policy_avg"] == pytest.approx(0, abs=0.5), "advantages are whitened"
    arrays = [array for value in received for array in arrays_in(value)]
    assert {str(a.dtype) for a in arrays} <= {"float64", "int64"}
    assert all(a.size <= 64 for a in arrays), "no token reaches the driver"


def test_the_checkpoint_holds_policy_and_critic(finished: Any, reward_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    _, result, _ = finished
    last = result.last_checkpoint
    assert AutoModelForCausalLM.from_pretrained(last).config.vocab_size
    critic = AutoModelForSequenceClassification.from_pretrained(last / "critic")
    start = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert critic.config.num_labels == 1
    gap = (critic.score.weight - start.score.weight).abs().max()
    assert 0 < gap < 0.1, "it began as the reward model"
    assert AutoTokenizer.from_pretrained(last / "critic").eos_token == "<|im_end|>"


@pytest.mark.variants
def test_resume_is_exact(finished: Any) -> None:
    """From the middle on, policy and critic repeat the run that was never stopped."""
    config, result, _ = finished
    whole = steps(result)
    again = steps(
        ppo.run(
            PPOConfig(**{**config.args(), "resume_from_checkpoint": str(result.run_dir / "checkpoint-4")})
        )
    )
    for step in range(5, 9):
        for name in ("loss/policy_avg", "loss/value_avg", "critic/grad_norm", "grad_norm", "reward", "kl"):
            assert again[step][name] == whole[step][name], (step, name)


JUDGE = """
from swift.plugin import GenRMPlugin, rm_plugins
from swift.llm import RequestConfig

class Graded(GenRMPlugin):
    request_config = RequestConfig(max_tokens=8)

    def prepare_rm_inputs(self, inputs):
        assert all(one["messages"][-1]["role"] == "assistant" and one["solution"] for one in inputs)
        return [{"messages": one["messages"] + [{"role": "user", "content": "?"}]} for one in inputs]

    def compute_rewards(self, results):
        return [len(result.choices[0].message.content) for result in results]

rm_plugins["graded"] = Graded
"""


def test_grpo_may_have_reward_models_alone_a_classifier_and_one_that_speaks(
    cluster: None, tiny: Tiny, reward_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    result = online.run(
        RLHFConfig(
            model=str(tiny.untied),
            dataset=str(tiny.data.train),
            reward_model=[str(reward_model), str(tiny.tied)],
            reward_model_plugin=["default", "graded"],
            reward_weights=[1.0, 0.25],
            external_plugins=[str(tmp_path / "judge.py")],
            train_type="full",
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=12,
            beta=0.0,
            max_steps=1,
            output_dir=str(tmp_path),
        )
    )
    line = steps(result)[1]
    classified, graded = line["rewards/RewardModel1/mean"], line["rewards/RewardModel2/mean"]
    assert line["reward"] == pytest.approx(classified + 0.25 * graded)
    assert graded > 0
    assert line["reward_std"] > 0
    assert line["grad_norm"] > 0
    assert line["reward_failures"] == 0
