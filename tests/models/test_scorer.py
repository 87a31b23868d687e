"""TokenScorer against the model's own logits, padded and packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from raytune_rl.errors import ModelError
from raytune_rl.models.scorer import TokenScorer

Batch = dict[str, Tensor | None]
LENGTHS = (7, 1, 12, 4)
PROMPT = (3, 1, 5, 2)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(300, (length,), generator=generator) for length in LENGTHS]


def padded(which: list[int]) -> Batch:
    data = rows()
    width = max(LENGTHS[i] for i in which)
    ids, mask = (
        torch.zeros(len(which), width, dtype=torch.long),
        torch.zeros(len(which), width, dtype=torch.long),
    )
    index, targets = [], []
    for line, i in enumerate(which):
        ids[line, : LENGTHS[i]], mask[line, : LENGTHS[i]] = data[i], 1
        for at in range(PROMPT[i], LENGTHS[i]):
            index.append(line * width + at - 1)
            targets.append(int(data[i][at]))
    positions = torch.arange(width)[None].repeat(len(which), 1)
    return _batch(ids, positions, mask, index, targets)


def packed(which: list[int]) -> Batch:
    data, index, targets, start = rows(), [], [], 0
    for i in which:
        for at in range(PROMPT[i], LENGTHS[i]):
            index.append(start + at - 1)
            targets.append(int(data[i][at]))
        start += LENGTHS[i]
    ids = torch.cat([data[i] for i in which])[None]
    positions = torch.cat([torch.arange(LENGTHS[i]) for i in which])[None]
    return _batch(ids, positions, None, index, targets)


def _batch(
    ids: Tensor, positions: Tensor, mask: Tensor | None, index: list[int], targets: list[int]
) -> Batch:
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask,
        "predict_index": torch.tensor(index, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
    }


def reference(model: Any, which: list[int], temperature: float) -> Tensor:
    """Each row alone through the model's own forward."""
    out = []
    for i in which:
        row = rows()[i]
        log_p = (model(input_ids=row[None]).logits[0].float() / temperature).log_softmax(-1)
        out += [log_p[at - 1, row[at]] for at in range(PROMPT[i], LENGTHS[i])]
    return torch.stack(out)


ORDER = [0, 1, 2, 3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", [padded, packed])
def test_layouts_equal_rows_alone(
    qwen2: Callable[..., Any], layout: Callable[[list[int]], Batch], attention: str
) -> None:
    model = qwen2(tied=False)
    model.set_attn_implementation(attention)
    scorer = TokenScorer(model, chunk_tokens=3)
    got = scorer(**layout(ORDER), temperature=0.8, with_entropy=True)
    torch.testing.assert_close(got.logprobs, reference(model, ORDER, 0.8), rtol=1e-5, atol=2e-5)
    assert got.entropy is not None
    assert got.entropy.shape == got.logprobs.shape


@pytest.mark.parametrize("layout", [padded, packed])
def test_gradients_equal_rows_alone(qwen2: Callable[..., Any], layout: Callable[[list[int]], Batch]) -> None:
    model = qwen2()
    reference(model, ORDER, 1.0).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    TokenScorer(model)(**layout(ORDER)).logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        gap = (parameter.grad - want[name]).abs().max() / want[name].abs().max()
        assert gap < 1e-5, (name, gap)


def test_packed_rows_do_not_see_each_other(qwen2: Callable[..., Any]) -> None:
    """Changing a row of the pack changes its own log-probs and nobody else's, bit for bit."""
    scorer = TokenScorer(qwen2())
    batch = packed([2, 0])
    before = scorer(**batch).logprobs
    assert isinstance(batch["input_ids"], Tensor)
    changed = batch["input_ids"].clone()
    changed[0, 1] = (changed[0, 1] + 7) % 300
    after = scorer(**{**batch, "input_ids": changed}).logprobs
    own = LENGTHS[2] - PROMPT[2]
    assert (before[:own] != after[:own]).all()
    assert torch.equal(before[own:], after[own:])


@pytest.mark.parametrize("lora", [False, True])
def test_dummy_batch_gives_zero_gradients_everywhere(qwen2: Callable[..., Any], lora: bool) -> None:
    model = qwen2(tied=False)
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    scorer = TokenScorer(model)
    got = scorer(
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, 1, dtype=torch.long),
        None,
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0, dtype=torch.long),
    )
    assert got.logprobs.shape == (0,)
    got.logprobs.sum().backward()
    trainable = [(n, p) for n, p in scorer.named_parameters() if p.requires_grad]
    assert trainable
    for name, parameter in trainable:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


def test_lora_is_active_and_only_the_adapter_learns(qwen2: Callable[..., Any]) -> None:
    model = get_peft_model(
        qwen2(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    )
    scorer = TokenScorer(model)
    got = scorer(**packed(ORDER)).logprobs
    torch.testing.assert_close(got, reference(model, ORDER, 1.0), rtol=1e-5, atol=2e-5)
    with model.disable_adapter():
        plain = scorer(**packed(ORDER)).logprobs
    assert (got - plain).abs().max() > 1e-2
    got.sum().backward()
    assert all(("lora_" in n) == (p.grad is not None) for n, p in model.named_parameters())


def test_gradient_checkpointing_changes_nothing(qwen2: Callable[..., Any]) -> None:
    from raytune_rl.models.load import enable_gradient_checkpointing

    model = qwen2().train()
    TokenScorer(model)(**packed(ORDER)).logprobs.sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    enable_gradient_checkpointing(model)
    TokenScorer(model)(**packed(ORDER)).logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-6)


def test_vision_model_scores_text(qwen2_vl: Callable[[], Any]) -> None:
    model = qwen2_vl()
    scorer = TokenScorer(model)
    scorer.verify()
    got = scorer(**padded([0, 2])).logprobs
    torch.testing.assert_close(got, reference(model, [0, 2], 1.0), rtol=1e-5, atol=2e-5)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}


def test_logit_transforms_are_honoured(qwen2: Callable[..., Any]) -> None:
    gemma = TokenScorer(Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0)))
    cohere = TokenScorer(CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)))
    for scorer in (gemma, cohere, TokenScorer(qwen2())):
        scorer.verify()
    gemma.softcap = None
    cohere.logit_scale = None
    for scorer in (gemma, cohere):
        with pytest.raises(ModelError, match="differ by"):
            scorer.verify()


def test_refuses_a_model_without_a_head(qwen2: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="head"):
        TokenScorer(qwen2().model)
