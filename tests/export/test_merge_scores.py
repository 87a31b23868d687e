"""A reward model's adapter merges into a reward model that Transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from raytune_rl.config import ExportConfig
from raytune_rl.export import run
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings


def test_base_adapter_and_head_become_one(tmp_path: Path, bases: Callable[..., Path]) -> None:
    base, adapter = bases(tied=True), tmp_path / "checkpoint-3"
    torch.manual_seed(4)
    settings = TunerSettings(lora_rank=4, init_weights="false")
    tuned = apply_tuner(load_model(str(base), scalar=True).model, settings)
    save_model(tuned.model, adapter, load_tokenizer(str(base)))
    lines: list[str] = []
    merged = run(ExportConfig(adapters=adapter, merge_lora=True), lines.append).merged
    assert merged is not None
    assert merged.parity.effect > 1e-2
    assert not any("random" in line for line in lines)
    ids = torch.tensor([[7, 300, 41, 41, 9, 500, 128, 3]])
    plain: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    again = AutoModelForSequenceClassification.from_pretrained(merged.path)
    with torch.no_grad():
        want = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits
        torch.testing.assert_close(again(ids).logits, want, rtol=1e-5, atol=1e-5)
