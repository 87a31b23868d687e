"""Dropout in a model's config, and what is left of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.protocol.model import ModelSpec
from raytune_rl.workers import scoring

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
OF_A_CONFIG: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SMALL, "attention_dropout": 0.3}),
    "granite": ("Granite", {**SMALL, "attention_dropout": 0.3}),
    "starcoder2": ("Starcoder2", {**SMALL, "residual_dropout": 0.3, "embedding_dropout": 0.3}),
    "phi": ("Phi", {**SMALL, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}),
    "gpt2": ("GPT2", {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3}),
    "falcon": ("Falcon", {**SMALL, "hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "opt": (
        "OPT",
        {**SMALL, "ffn_dim": 96, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5,
         "word_embed_proj_dim": 64},
    ),
}  # fmt: skip


def made(family: str, directory: Path, **more: Any) -> Path:
    base, settings = OF_A_CONFIG[family]
    torch.manual_seed(0)
    name = f"{base}LMHeadModel" if family == "gpt2" else f"{base}ForCausalLM"
    getattr(tf, name)(getattr(tf, f"{base}Config")(**settings, **more)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", OF_A_CONFIG)
def test_the_first_loss_of_dpo_is_ln_2(family: str, tmp_path: Path) -> None:
    def spec(own_dropout: bool) -> ModelSpec:
        return ModelSpec(str(made(family, tmp_path)), "float32", "eager", "padded", own_dropout=own_dropout)

    ids = torch.arange(40).reshape(2, 20) + 3
    index, targets = torch.tensor([*range(19), *range(20, 39)]), ids[:, 1:].reshape(-1)

    def logprobs(model: Any, training: bool) -> torch.Tensor:
        scorer = TokenScorer(model).train(training)
        torch.manual_seed(1)
        positions = torch.arange(20).expand(2, -1)
        return scorer(ids, positions, torch.ones_like(ids), index, targets).logprobs

    def loss(model: Any) -> float:
        dpo = get_loss("dpo")
        found = dpo(
            LossInputs(
                logprobs=logprobs(model, True),
                row_of=torch.arange(2).repeat_interleave(19),
                n_rows=2,
                settings=dpo.settings_type(),
                columns={"ref_logprobs": logprobs(model, False).detach()},
                row_values={PAIR: torch.from_numpy(pair_numbers(1))},
            )
        )
        return float(found.total(None, torch.ones(2, dtype=torch.float64)))

    loud = scoring.load(spec(True))
    assert abs(loss(loud.model) - math.log(2)) > 1e-4
    silent = scoring.load(spec(False))
    assert loss(silent.model) == pytest.approx(math.log(2), abs=1e-7)
    (notice,) = [line for line in silent.notices if "dropout" in line]
    given = OF_A_CONFIG[family][1]
    assert all(f"{name} {rate:g}" in notice for name, rate in given.items() if "drop" in name)
    # A checkpoint keeps the config that the model came with.
    assert silent.model.config.to_dict() == loud.model.config.to_dict()
