"""Rows of a micro-batch and the same rows alone, over families of Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from raytune_rl.errors import ModelError
from raytune_rl.models.borders import borders_of
from raytune_rl.models.scalar import ScalarScorer
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.workers import isolation

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
OLD: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", SMALL),
    "llama": ("Llama", SMALL),
    "gemma3_text": ("Gemma3", {**SMALL, "head_dim": 16, "sliding_window": 5}),
    "qwen3_moe": ("Qwen3Moe", {**SMALL, "head_dim": 16, "mlp_only_layers": [], **EXPERTS}),
    "gpt2": ("GPT2", {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}
SEEN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": ("Qwen3_5", {**SMALL, **DELTA}),
    "qwen3_next": ("Qwen3Next", {**SMALL, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 32}),
    "gpt_oss": ("GptOss", {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2": ("Lfm2", {**SMALL, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "falcon": ("Falcon", {**OLD, "num_hidden_layers": 2}),
    "opt": (
        "OPT",
        {**OLD, "init_std": 0.15, "num_hidden_layers": 2, "ffn_dim": 96, "word_embed_proj_dim": 64,
         "max_position_embeddings": 256},
    ),
    "bloom": ("Bloom", {**OLD, "n_layer": 2, "n_head": 4}),
}  # fmt: skip


def model(base: str, settings: dict[str, Any], head: str = "ForCausalLM") -> Any:
    torch.manual_seed(0)
    kind = getattr(tf, f"{base}TextConfig", None) or getattr(tf, f"{base}Config")
    made = getattr(tf, base + head, None) or getattr(tf, f"{base}LMHeadModel")
    return made(kind(**settings)).float().eval()


@pytest.mark.parametrize("family", WHOLE)
def test_packed_rows_are_as_alone(family: str) -> None:
    scorer = TokenScorer(model(*WHOLE[family]))
    assert isolation.gap(scorer, "packed") < 1e-4 > isolation.gap(scorer, "padded")
    assert isolation.settle(scorer, "packed", "--packing true").layout == "packed"
    assert not scorer.tells_borders


@pytest.mark.parametrize("family", SEEN)
def test_rows_that_see_each_other_are_refused_or_padded(family: str) -> None:
    scorer = TokenScorer(model(*SEEN[family])).train()
    with pytest.raises(ModelError, match=f"--packing true: packed rows of model type '{family}' see each"):
        isolation.settle(scorer, "packed", "--packing true")
    settled = isolation.settle(scorer, "packed")
    assert settled.layout == "padded"
    assert family in settled.notices[0]
    assert isolation.gap(scorer, "padded") < 1e-4
    assert scorer.training


def test_a_critics_new_head_does_not_hide_what_its_rows_see() -> None:
    critic = model("Qwen3_5", {**SMALL, **DELTA, "num_labels": 1}, "ForSequenceClassification")
    critic.score.weight.data.zero_()
    with pytest.raises(ModelError, match="--padding_free true"):
        isolation.settle(ScalarScorer(critic), "packed", "--padding_free true")
    right = model("Qwen2", {**SMALL, "num_labels": 1}, "ForSequenceClassification")
    assert isolation.settle(ScalarScorer(right, skips_padding=True), "packed").layout == "packed"


@pytest.mark.parametrize("family", [*WHOLE, *SEEN])
def test_padding_needs_no_mask_where_nothing_looks_back_from_it(family: str) -> None:
    scorer = TokenScorer(model(*{**WHOLE, **SEEN}[family]))
    isolation.leave_mask_out(scorer)
    assert not scorer.masks_padding
    assert isolation.gap(scorer, "padded") < 1e-4


def test_media_keep_their_mask() -> None:
    scorer = TokenScorer(model(*WHOLE["llama"]))
    mask = torch.ones(1, 3, dtype=torch.long)
    assert scorer._mask(mask, {}) is mask
    scorer.masks_padding = False
    assert scorer._mask(mask, {}) is None
    assert scorer._mask(mask, {"pixel_values": mask}) is mask


class Polluted(torch.nn.Module):
    """An embedding that takes padding for text: the mean over all of a row's positions."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.inner(ids)
        return found + found.mean(1, keepdim=True)


def test_a_model_that_reads_padding_is_refused() -> None:
    broken = model(*WHOLE["llama"])
    broken.set_input_embeddings(Polluted(broken.get_input_embeddings()))
    with pytest.raises(ModelError, match="model type 'llama' gives a row beside a longer one other"):
        isolation.settle(TokenScorer(broken), "padded")
    scorer = TokenScorer(broken)
    isolation.leave_mask_out(scorer)
    assert scorer.masks_padding


@pytest.mark.parametrize(("dtype", "layout"), [(torch.bfloat16, "packed"), (torch.bfloat16, "padded")])
def test_rounding_is_no_leak(dtype: torch.dtype, layout: str) -> None:
    assert isolation.settle(TokenScorer(model(*WHOLE["llama"]).to(dtype)), layout).layout == layout
    with pytest.raises(ModelError):
        isolation.settle(TokenScorer(model(*SEEN["opt"]).to(dtype)), "packed", "--packing true")


def test_the_borders_that_kernels_are_told() -> None:
    borders = borders_of(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert borders["cu_seq_lens_q"].tolist() == [0, 3, 4, 6] == borders["cu_seq_lens_k"].tolist()
    assert borders["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert borders["max_length_q"] == 3
    assert borders["cu_seq_lens_q"].dtype == borders["seq_idx"].dtype == torch.int32


class Kernel(torch.nn.Module):
    """A convolution as the CUDA kernel does it: row by row of a pack, by `seq_idx`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: torch.Tensor, seq_idx: torch.Tensor | None = None, **given: Any
    ) -> torch.Tensor:
        if seq_idx is None:
            return self.layer(hidden_states, **given)
        sizes = torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist()
        return torch.cat([self.layer(row, **given) for row in hidden_states.split(sizes, dim=1)], dim=1)


def test_layers_that_can_be_told_are() -> None:
    lfm = model(*SEEN["lfm2"])
    lfm.model.layers[0].conv = Kernel(lfm.model.layers[0].conv)
    scorer = TokenScorer(lfm)
    assert isolation.settle(scorer, "packed", "--packing true").layout == "packed"
    assert scorer.tells_borders


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "qwen3_moe", "gpt2"])
def test_rows_that_begin_alike_share_it(family: str) -> None:
    scorer = TokenScorer(model(*WHOLE[family])).train()
    assert isolation.settle_sharing(scorer, "auto") == ("auto", ())
    assert isolation.shared_gap(scorer) < 1e-4
    assert scorer.training
    assert isolation.settle(scorer, "packed", "--packing true").layout == "packed"


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon", "bloom"])
def test_models_that_cannot_share_compute_each_row_for_itself(family: str) -> None:
    scorer = TokenScorer(model(*SEEN[family]))
    before = scorer.model.config._attn_implementation
    sharing, notices = isolation.settle_sharing(scorer, "auto")
    assert sharing == "false"
    assert f"model type '{family}' cannot share it" in notices[0]
    assert scorer.model.config._attn_implementation == before
    assert isolation.gap(scorer, "padded") < 1e-4
    with pytest.raises(ModelError, match="--prefix_sharing true: each row computes its prompt for itself"):
        isolation.settle_sharing(scorer, "true")
    assert isolation.settle_sharing(scorer, "false") == ("false", ())


def test_a_model_that_mixes_rows_does_not_share() -> None:
    broken = model(*WHOLE["llama"])
    broken.set_input_embeddings(Polluted(broken.get_input_embeddings()))
    sharing, notices = isolation.settle_sharing(TokenScorer(broken), "auto")
    assert sharing == "false"
    assert "log-probs differ by up to" in notices[0]


def test_a_critics_rows_share() -> None:
    critic = model("Qwen2", {**SMALL, "num_labels": 1}, "ForSequenceClassification")
    critic.score.weight.data.zero_()
    assert isolation.settle_sharing(ScalarScorer(critic), "true") == ("true", ())
