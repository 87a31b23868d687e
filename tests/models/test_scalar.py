"""ScalarScorer against Transformers' sequence classification: padded, packed, trained, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
)

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.errors import ModelError
from raytune_rl.models.load import LoadedModel, load_model
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import ModelSpec, TunerSettings
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.judge import is_classifier
from raytune_rl.workers.scoring import forward_inputs, load, scorer_of

LENGTHS = (7, 2, 12, 4)
PAD = 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("scalar") / "tiny", hidden=64, layers=2, tied=False)


def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(20, 300, length) for length in LENGTHS]


def micro(layout: str, which: tuple[int, ...] = (0, 1, 2, 3)) -> MicroBatch:
    masks = [np.arange(LENGTHS[i]) >= LENGTHS[i] // 2 for i in which]
    return collate([rows()[i] for i in which], masks, layout=layout, pad_token_id=PAD)  # type: ignore[arg-type]


def loaded(directory: Path, seed: int = 3) -> LoadedModel:
    torch.manual_seed(seed)
    return load_model(str(directory), scalar=True)


def transformers_scores(model: Any) -> Tensor:
    """All rows in one padded batch, as a user of Transformers would have them."""
    batch = micro("padded")
    ids = torch.where(batch.attention_mask == 1, batch.input_ids, model.config.pad_token_id)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=batch.attention_mask).logits[:, 0]


def moved(model: Any) -> Any:
    """A trained model, as far as this test can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_scores_are_transformers_in_both_layouts(directory: Path, layout: str) -> None:
    found = loaded(directory)
    scorer = ScalarScorer(found.model, skips_padding=True)
    scorer.verify()
    got = scorer(**forward_inputs(micro(layout), "scores"))
    want = transformers_scores(found.model)
    assert want.std() > 0.01
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_value_knows_what_came_before_its_token_only(directory: Path, layout: str) -> None:
    model = loaded(directory).model
    got = ScalarScorer(model)(**forward_inputs(micro(layout), "values"))
    want = []
    for row, length in zip(rows(), LENGTHS, strict=True):
        for at in range(length // 2, length):
            want.append(model(input_ids=torch.from_numpy(row)[None, :at]).logits[0, 0])
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)


def test_a_row_that_ends_in_padding_tokens_is_read_where_transformers_reads_it(directory: Path) -> None:
    model = loaded(directory).model
    model.config.pad_token_id = int(rows()[2][-1])
    batch = micro("padded", (0, 2))
    got = ScalarScorer(model, skips_padding=True)(**forward_inputs(batch, "scores"))
    want = model(input_ids=torch.from_numpy(rows()[2])[None]).logits[0, 0]
    torch.testing.assert_close(got[1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_a_saved_model_scores_the_same_in_transformers(
    directory: Path, tmp_path: Path, tuner_type: Any
) -> None:
    tuned = apply_tuner(loaded(directory).model, TunerSettings(tuner_type, lora_rank=4))
    scorer = ScalarScorer(moved(tuned.model), skips_padding=True).eval()
    got = scorer(**forward_inputs(micro("packed"), "scores"))
    save_model(scorer, tmp_path)
    if tuner_type == "full":
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert not load_model(str(tmp_path), scalar=True).new_head, "its head is its own now"
    else:
        base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
        again = PeftModel.from_pretrained(base, str(tmp_path))
        went_on = apply_tuner(loaded(directory, seed=9).model, TunerSettings("lora"), [str(tmp_path)])
        mine = ScalarScorer(went_on.model).eval()(**forward_inputs(micro("padded"), "scores"))
        torch.testing.assert_close(mine, got, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, transformers_scores(again), rtol=0, atol=1e-5)


def test_lora_trains_adapter_and_head(directory: Path) -> None:
    tuned = apply_tuner(loaded(directory).model, TunerSettings("lora"))
    ScalarScorer(tuned.model)(**forward_inputs(micro("packed"), "values")).sum().backward()
    learning = {n for n, p in tuned.model.named_parameters() if p.grad is not None}
    assert any("score.modules_to_save" in n for n in learning)
    assert all("lora_" in n or "score.modules_to_save" in n for n in learning)
    assert not any("lora_" in n and "score" in n for n in learning), "the head has no adapter"


@pytest.mark.parametrize("forward", ["values", "scores"])
@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_dummy_batch_gives_zero_gradients_everywhere(directory: Path, tuner_type: Any, forward: Any) -> None:
    scorer = ScalarScorer(apply_tuner(loaded(directory).model, TunerSettings(tuner_type)).model)
    got = scorer(**forward_inputs(micro("padded", ()), forward))
    assert got.shape == (0,)
    got.sum().backward()
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() == 0, name


@pytest.mark.parametrize("forward", ["values", "scores"])
@pytest.mark.parametrize("tuner_type", ["full", "lora"])
def test_granite_gets_a_head_that_transformers_has_not(
    tmp_path: Path, tuner_type: Any, forward: Literal["values", "scores"]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(
        vocab_size=320, pad_token_id=0, embedding_multiplier=12.0, logits_scaling=8.0, **sizes
    )
    speaker = GraniteForCausalLM(config).eval()
    speaker.save_pretrained(tmp_path / "base")
    spec = ModelSpec(str(tmp_path / "base"), "float32", None, "padded")
    torch.manual_seed(3)
    made = load(spec, forward)
    assert made.new_head
    assert made.notices == ()
    assert bool((made.model.score.weight == 0).all()) == (forward == "values"), "a critic's starts at 0"
    scorer = scorer_of(made.model, forward)
    batch = micro("padded")
    index = torch.arange(batch.input_ids.numel())
    with torch.no_grad():
        states = speaker.model(batch.input_ids, batch.attention_mask).last_hidden_state
        seen = scorer.states(batch.input_ids, batch.position_ids, batch.attention_mask, index)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(seen[real.flatten()], states[real], rtol=0, atol=1e-5)
    settings = TunerSettings(tuner_type, lora_rank=4)
    trained = scorer_of(moved(apply_tuner(made.model, settings).model), forward).eval()
    got = trained(**forward_inputs(batch, forward))
    assert got.std() > 0.01
    save_model(trained, tmp_path / "saved")
    saved = str(tmp_path / "saved")
    if tuner_type == "full":
        again = load(replace(spec, path=saved), forward)
        assert not again.new_head, "its head is its own now"
        back = again.model
    else:
        back = apply_tuner(load(spec, forward).model, settings, [saved]).model
    again = scorer_of(back, forward).eval()(**forward_inputs(batch, forward))
    assert torch.allclose(again, got, rtol=0, atol=1e-6)  # rounding follows how threads share the work
    assert is_classifier(saved)


def test_a_new_head_comes_from_the_seed(directory: Path) -> None:
    first, again, other = loaded(directory), loaded(directory), loaded(directory, seed=4)
    assert first.new_head
    assert first.notices == (), "the head over the vocabulary is not missed"
    assert torch.equal(first.model.score.weight, again.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)


def test_what_has_no_single_score_is_refused(
    directory: Path, tmp_path: Path, qwen2: Callable[..., Any]
) -> None:
    AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="classifier of 3 labels"):
        load_model(str(tmp_path), scalar=True)
    AutoConfig.for_model("vit", pad_token_id=0).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="no sequence classification"):
        load_model(str(tmp_path / "other"), scalar=True)
    with pytest.raises(ModelError, match="no head of one output"):
        ScalarScorer(qwen2())
