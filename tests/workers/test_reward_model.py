"""Reward models score a conversation as Transformers does, whatever directory they come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from raytune_rl.errors import ConfigError, ModelError, RewardError
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import ModelSpec, TunerSettings
from raytune_rl.protocol.rewards import RewardModelSpec, TrainerState
from raytune_rl.rewards import judge
from raytune_rl.rewards.judge import GenRMPlugin, plugin_class
from raytune_rl.rewards.judge_answers import JudgeAnswer, JudgeChoice, Spoken
from raytune_rl.rewards.plugins import load_plugins
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.judge import JudgeTemplate
from raytune_rl.workers.reward_model import RewardModelWorker

TEXTS = ("4", "It is 42, I think.", "Forty two, and that is all there is to say of it.", "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("rm") / "tiny", hidden=64, layers=2)


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    torch.manual_seed(2)
    save_model(load_model(str(base), scalar=True).model, directory, load_tokenizer(str(base)))
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(5)
    tuned = apply_tuner(load_model(str(base), scalar=True).model, TunerSettings(init_weights="false"))
    save_model(tuned.model, directory, load_tokenizer(str(base)))
    return directory


def worker(*paths: Path) -> RewardModelWorker:
    models = tuple(ModelSpec(str(path), "float32", None, "padded") for path in paths)
    return RewardModelWorker(RewardModelSpec(models, tuple(p.name for p in paths), 64, 10.0))


def conversation(text: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "What is 40 + 2?"}, {"role": "assistant", "content": text}]
    return {"messages": turns, "solution": "42"}


def conversations() -> list[dict[str, Any]]:
    return [conversation(text) for text in TEXTS]


def transformers_scores(model: Any, directory: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for one in conversations():
        text = tokenizer.apply_chat_template(one["messages"], tokenize=False)
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(**ids).logits))
    return scores


def test_scores_of_several_models_are_transformers(base: Path, full: Path, adapter: Path) -> None:
    found = worker(full, adapter).judge(conversations())
    assert found.values.shape == (4, 2)
    want = transformers_scores(AutoModelForSequenceClassification.from_pretrained(full), full)
    np.testing.assert_allclose(found.values[:, 0], want, rtol=0, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    with_adapter = PeftModel.from_pretrained(plain, str(adapter)).eval()
    np.testing.assert_allclose(found.values[:, 1], transformers_scores(with_adapter, base), rtol=0, atol=1e-5)
    assert len(np.unique(found.values)) == 8
    assert found.labels == (full.name, adapter.name)
    assert found.failures == ()


def test_a_conversation_that_cannot_be_read_is_a_failure_with_its_reason(full: Path) -> None:
    found = worker(full).judge([conversation("4"), conversation("seven " * 1200)])
    assert np.isfinite(found.values[0, 0])
    assert np.isnan(found.values[1, 0])
    (failure,) = found.failures
    assert failure.row == 1
    assert "tokens, and the model takes 1024" in failure.message


def test_a_language_model_is_no_reward_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a reward model.*--rlhf_type rm.*genrm"):
        worker(base)
    policy = apply_tuner(load_model(str(base)).model, TunerSettings())
    save_model(policy.model, tmp_path)
    with pytest.raises(ModelError, match="not a reward model"):
        worker(tmp_path)


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    with pytest.raises(ConfigError, match="does not name the model"):
        worker(tmp_path)


PLUGIN = """
from swift.llm import PtEngine, RequestConfig
from swift.plugin import rm_plugins
from swift.plugin.rm_plugin import DefaultRMPlugin, GenRMPlugin

class Theirs(DefaultRMPlugin):
    # Written as for ms-swift: an engine of its own, and the row's columns beside the messages.
    def __init__(self, model, template):
        super().__init__(model, template)
        self.engine = PtEngine(self.model, template=self.template, max_batch_size=0)
        self.config = RequestConfig(max_tokens=6)

    def __call__(self, inputs, trainer_state=None, **kwargs):
        assert all(one["solution"] == "42" for one in inputs)
        asked = [{"messages": one["messages"][:1]} for one in inputs]
        answers = self.engine.infer(asked, self.config, use_tqdm=False)
        self.said = [answer.choices[0].message.content for answer in answers]
        return [float(len(one["messages"][-1]["content"])) for one in inputs]

class Graded(GenRMPlugin):
    request_config = RequestConfig(max_tokens=8)

    def compute_rewards(self, results):
        return [len(result.choices[0].message.content) / 100 for result in results]

class Broken(GenRMPlugin):
    def __call__(self, inputs, **kwargs):
        return [1 / 0 for _ in inputs]

rm_plugins.update(theirs=Theirs, graded=Graded, broken=Broken, scores=DefaultRMPlugin)
rm_plugins["vectors"] = DefaultRMPlugin
"""


@pytest.fixture
def plugin_file(tmp_path: Path) -> Iterator[str]:
    before = dict(judge.rm_plugins)
    file = tmp_path / "judges.py"
    file.write_text(PLUGIN)
    yield str(file)
    judge.rm_plugins.clear()
    judge.rm_plugins.update(before)


def judged(plugin_file: str, **plugins: Path) -> RewardModelWorker:
    models = tuple(ModelSpec(str(path), "float32", None, "padded") for path in plugins.values())
    spec = RewardModelSpec(models, tuple(plugins), 64, 10.0, tuple(plugins), (plugin_file,))
    return RewardModelWorker(spec)


def test_plugins_of_ms_swift_ask_models_in_their_own_way(base: Path, full: Path, plugin_file: str) -> None:
    asked = judged(plugin_file, theirs=base, graded=base, scores=full, broken=base, vectors=base)
    found = asked.judge(conversations(), TrainerState(1, 2))
    np.testing.assert_array_equal(found.values[:, 0], [len(text) for text in TEXTS])
    want = transformers_scores(AutoModelForSequenceClassification.from_pretrained(full), full)
    np.testing.assert_allclose(found.values[:, 2], want, rtol=0, atol=1e-5)
    assert np.isnan(found.values[:, 3:]).all()
    reasons = {f.function: f.message for f in found.failures}
    assert reasons.keys() == {"broken", "vectors"}
    assert "ZeroDivisionError" in reasons["broken"]
    assert "a list in place of a number" in reasons["vectors"], "it is no classifier"
    # What the engine said to a batch of unequal prompts is what the model says to each of them alone.
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    grader = GenRMPlugin(model, JudgeTemplate(tokenizer, 10_000))
    for number, request in enumerate(grader.prepare_rm_inputs(conversations())):
        text = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        said = tokenizer.decode(out, skip_special_tokens=True)
        assert found.values[number, 1] == pytest.approx(len(said) / 100)


def test_a_judge_that_gives_no_number_is_a_failure_and_not_a_zero(base: Path, plugin_file: str) -> None:
    found = judged(plugin_file, genrm=base).judge([conversation("42"), conversation("seven " * 1200)])
    assert np.isnan(found.values).all()
    assert [f.row for f in found.failures] == [0, 1]
    assert "no 'Reward: x'" in found.failures[0].message
    assert "is there room" in found.failures[1].message
    with pytest.raises(RewardError, match=r"gemrm is not registered\. Did you mean genrm"):
        judged(plugin_file, gemrm=base)


def test_the_example_asks_about_the_solution(base: Path, plugin_file: str) -> None:
    example = str(Path(__file__).parents[2] / "examples" / "judge.py")
    load_plugins([example])
    plugin = plugin_class("same_answer")(None, object())
    (asked,) = plugin.prepare_rm_inputs([conversation("It is 42, I think.")])
    (turn,) = asked["messages"]
    for part in ("Problem:\nWhat is 40 + 2?", "Right answer:\n42", "student:\nIt is 42, I think."):
        assert part in turn["content"]
    assert plugin.compute_rewards([JudgeAnswer([JudgeChoice(Spoken("Yes.\nReward: 1"), "stop")])]) == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Fine.\nReward: 0.75", 0.75),
        ("Reward: 0.1, on second thought\n**Reward:** 1", 1.0),
        ("Reward: 7", None),
        ("Reward: -0.5", None),
        ("reward = .5", 0.5),
        ("No number", None),
    ],
)
def test_reading_a_reward(text: str, reward: float | None) -> None:
    assert GenRMPlugin.extract_reward(text) == reward
