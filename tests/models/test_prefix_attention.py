"""Rows that share their beginning give the log-probs and the gradient of each row alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from raytune_rl.data.collate import MicroBatch, collate
from raytune_rl.data.shared_prefix import collate_shared
from raytune_rl.errors import ModelError
from raytune_rl.models.load import enable_gradient_checkpointing
from raytune_rl.models.prefix_attention import let_share, short_mask, take_back
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.scorer import TokenScorer

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
HEAD: dict[str, Any] = {**SMALL, "head_dim": 8}
GEMMA2: dict[str, Any] = {**HEAD, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
EXPERTS: dict[str, Any] = {
    "experts_implementation": "eager",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", SMALL),
    "qwen2, windows": (
        "Qwen2",
        {**SMALL, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", HEAD),
    "qwen3_moe": ("Qwen3Moe", {**HEAD, "mlp_only_layers": [], **EXPERTS}),
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "gemma2": ("Gemma2", {**GEMMA2, "sliding_window": 4}),
    "gemma2, eager": ("Gemma2", {**GEMMA2, "sliding_window": 4, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3", {**HEAD, "sliding_window": 6}),
    "phi3": ("Phi3", {**SMALL, "sliding_window": 7}),
    "olmo2": ("Olmo2", SMALL),
    "granite": ("Granite", SMALL),
    "gpt_oss": (
        "GptOss",
        {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
         "attn_implementation": "eager", "experts_implementation": "eager"},
    ),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}  # fmt: skip

PROMPTS = {3: list(range(5, 16)), 8: [40, 41], 9: list(range(50, 74))}
COMPLETIONS = [(3, 4), (8, 6), (3, 1), (3, 9), (8, 6), (5, 7), (3, 4), (9, 5), (9, 3)]
"""Group and tokens of each row's answer; groups are not in order, one row is alone, one prompt is long."""


def rows() -> tuple[list[np.ndarray], list[np.ndarray], list[int], list[int]]:
    draw = np.random.default_rng(0)
    tokens, masks, groups, prefixes = [], [], [], []
    for group, length in COMPLETIONS:
        prompt = PROMPTS.get(group, [7, 7, 7])
        tokens.append(np.array([*prompt, *draw.integers(1, 96, length)], dtype=np.int32))
        masks.append(np.arange(len(tokens[-1])) >= len(prompt))
        groups.append(group)
        prefixes.append(len(prompt))
    return tokens, masks, groups, prefixes


def shared_rows() -> MicroBatch:
    tokens, masks, groups, prefixes = rows()
    return collate_shared(tokens, masks, groups, prefixes, pad_token_id=0)


def model(base: str, settings: dict[str, Any], head: str = "ForCausalLM") -> Any:
    torch.manual_seed(0)
    kind = getattr(tf, f"{base}TextConfig", None) or getattr(tf, f"{base}Config")
    made = getattr(tf, base + head, None) or getattr(tf, f"{base}LMHeadModel")
    return made(kind(**settings)).float().eval()


def hidden_logprobs(inner: Any, micro: MicroBatch) -> torch.Tensor:
    """Log-probs of the loss tokens in the model's own precision."""
    states = inner.base_model(
        input_ids=micro.input_ids,
        position_ids=micro.position_ids,
        attention_mask=short_mask(micro.shared) if micro.shared else micro.attention_mask,
        use_cache=False,
    ).last_hidden_state
    logits = inner.get_output_embeddings()(states.flatten(0, 1)[micro.predict_index])
    return logits.log_softmax(-1).gather(-1, micro.targets[:, None])[:, 0]


def gradient(inner: Any, of: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and the gradient of their sum weighted by how far along each stands."""
    inner.zero_grad()
    values = of()
    (values * torch.linspace(-1, 1, len(values), dtype=values.dtype)).sum().backward()
    grads = [p.grad.flatten() for p in inner.parameters() if p.grad is not None]
    return values.detach(), torch.cat(grads)


def assert_alike(found: tuple, wanted: tuple, tolerance: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.fixture
def no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, softmax and routers of Transformers round to float32 whatever the model's type: not here."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float64(family: str, no_float32: None) -> None:
    inner = model(*FAMILIES[family]).double()
    tokens, masks, *_ = rows()
    padded = collate(tokens, masks, layout="padded", pad_token_id=0)
    wanted = gradient(inner, lambda: hidden_logprobs(inner, padded))
    assert let_share(inner) == ""
    assert_alike(gradient(inner, lambda: hidden_logprobs(inner, shared_rows())), wanted, 1e-10)
    # Rows laid out otherwise are computed as before, to the bit.
    again = gradient(inner, lambda: hidden_logprobs(inner, padded))
    assert all(torch.equal(mine, before) for mine, before in zip(again, wanted, strict=True))
    take_back(inner)
    assert "shared" not in inner.config._attn_implementation


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_scorer_in_float32(family: str, checkpointing: bool, lora: bool) -> None:
    inner = model(*FAMILIES[family])
    if lora:
        inner = get_peft_model(inner, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    scorer = TokenScorer(inner)
    tokens, masks, *_ = rows()
    micro = collate(tokens, masks, layout="padded", pad_token_id=0)

    def scored(micro: MicroBatch) -> torch.Tensor:
        seen = (micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index, micro.targets)
        return scorer(*seen, temperature=0.7, shared=micro.shared).logprobs

    wanted = gradient(scorer, lambda: scored(micro))
    base = inner.get_base_model() if lora else inner
    assert let_share(base) == ""
    if checkpointing:
        enable_gradient_checkpointing(base)
        scorer.train()
    assert_alike(gradient(scorer, lambda: scored(shared_rows())), wanted, 2e-6)


def test_values_of_a_critic() -> None:
    critic = model("Qwen2", {**SMALL, "num_labels": 1}, "ForSequenceClassification")
    scorer = ScalarScorer(critic)
    tokens, masks, *_ = rows()
    padded, shared = collate(tokens, masks, layout="padded", pad_token_id=0), shared_rows()

    def values(micro: MicroBatch) -> torch.Tensor:
        seen = (micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index)
        return scorer(*seen, shared=micro.shared)

    wanted = gradient(critic, lambda: values(padded))
    assert let_share(critic) == ""
    assert_alike(gradient(critic, lambda: values(shared)), wanted, 2e-6)


def test_a_group_cut_in_two_gives_the_gradient_of_the_whole(no_float32: None) -> None:
    inner = model(*FAMILIES["qwen3"]).double()
    assert let_share(inner) == ""
    tokens, masks, groups, prefixes = rows()

    def backward(parts: list[list[int]]) -> torch.Tensor:
        inner.zero_grad()
        for part in parts:
            given = ([column[row] for row in part] for column in (tokens, masks, groups, prefixes))
            micro = collate_shared(*given, pad_token_id=0)
            weights = torch.tensor([0.5 + row for row in part])[micro.row_of]
            (hidden_logprobs(inner, micro) * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in inner.parameters()])

    whole = backward([list(range(len(tokens)))])
    torch.testing.assert_close(backward([[0, 1, 6, 8], [2, 4, 5], [3, 7]]), whole, rtol=0, atol=1e-10)


def test_models_that_cannot_share_say_why() -> None:
    linear = {**HEAD, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
              "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    assert let_share(model("Qwen3_5", linear)) == "its layers have linear_attention"
    bloom = {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "attn_implementation": "eager"}
    assert "AttentionInterface" in let_share(model("Bloom", bloom))


def test_a_layer_whose_window_is_not_that_of_the_config_is_refused() -> None:
    inner = model(*FAMILIES["gemma3"])
    assert let_share(inner) == ""
    inner.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(ModelError, match="layer 0 sees None tokens, and 6 by its config"):
        hidden_logprobs(inner, shared_rows())
