"""Checkpoints stop where the turns that were trained end."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from raytune_rl.config import ExportConfig
from raytune_rl.data.chat import CHATML
from raytune_rl.export.merge import merge
from raytune_rl.models.load import load_model, load_tokenizer
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import save_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers.scoring import end_of_turn_in_files


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """As base models are: ChatML's tokens, no template, and <|endoftext|> as the end of everything."""
    path = make_tiny_model(tmp_path / "base", hidden=64, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    (path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["full", "lora", "merged"])
def test_a_base_models_checkpoint_stops_at_the_end_of_a_turn(base: Path, tmp_path: Path, kind: str) -> None:
    loaded, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    saved = tmp_path / "checkpoint"
    tuned = apply_tuner(loaded.model, TunerSettings(tuner_type="full" if kind == "full" else "lora")).model
    assert "'<|im_end|>' ends the turns" in end_of_turn_in_files(loaded, tokenizer)[0]
    save_model(tuned, saved, tokenizer)
    if kind == "merged":
        asked = ExportConfig(adapters=(str(saved),), merge_lora=True, output_dir=str(tmp_path / "merged"))
        saved = merge(asked, lambda line: None).path
    assert GenerationConfig.from_pretrained(saved).eos_token_id == ends
    assert AutoTokenizer.from_pretrained(saved).chat_template == CHATML
    assert end_of_turn_in_files(load_model(str(base)), load_tokenizer(str(saved))) != ()


def test_a_model_that_stops_there_already_is_left_alone(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "chat", hidden=64, layers=1)
    loaded, tokenizer = load_model(str(path)), load_tokenizer(str(path))
    before = loaded.model.generation_config.eos_token_id
    assert end_of_turn_in_files(loaded, tokenizer) == ()
    assert loaded.model.generation_config.eos_token_id == before
