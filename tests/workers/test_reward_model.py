"""Reward models score a conversation as Transformers does, whatever directory they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raytune_rl.data.example import Example, Message
from raytune_rl.errors import ConfigError, ModelError
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.settings import TunerSettings
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.reward_model import RewardModelSpec, RewardModelWorker
from raytune_rl.workers.scoring import ModelSpec

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


def examples() -> list[Example]:
    question = Message("user", "What is 40 + 2?")
    return [Example((question, Message("assistant", text))) for text in TEXTS]


def transformers_scores(model: Any, directory: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    scores = []
    for example in examples():
        turns = [{"role": m.role, "content": m.content} for m in example.messages]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(**ids).logits))
    return scores


def test_scores_of_several_models_are_transformers(base: Path, full: Path, adapter: Path) -> None:
    found = worker(full, adapter).judge(examples())
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
    endless = Example((Message("user", "?"), Message("assistant", "seven " * 1200)))
    found = worker(full).judge([*examples()[:1], endless])
    assert np.isfinite(found.values[0, 0])
    assert np.isnan(found.values[1, 0])
    (failure,) = found.failures
    assert failure.row == 1
    assert "tokens, and the model takes 1024" in failure.message


def test_a_language_model_is_no_reward_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a reward model.*--rlhf_type rm"):
        worker(base)
    policy = apply_tuner(load_model(str(base)).model, TunerSettings())
    save_model(policy.model, tmp_path)
    with pytest.raises(ModelError, match="not a reward model"):
        worker(tmp_path)


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    with pytest.raises(ConfigError, match="does not name the model"):
        worker(tmp_path)
