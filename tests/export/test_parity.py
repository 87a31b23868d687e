"""Models that see or hear: that part is compared too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from raytune_rl.export import merge as merging
from raytune_rl.export.errors import ParityError
from raytune_rl.models.load import load_model
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.audio import make_tiny_audio_model
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer
from tests.export.conftest import Train
from tests.export.test_merge import beside, merge

SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def vision_base(tmp_path: Path) -> Path:
    tokenizer = make_tiny_tokenizer(SPECIAL)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    tokenizer.chat_template = TEMPLATE
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
            "initializer_range": 0.2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    path = tmp_path / "base"
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )
    processor.save_pretrained(path)
    return path


def test_adapters_on_tower_and_text_are_merged(
    tmp_path: Path, vision_base: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TunerSettings(lora_rank=4, freeze_vit=False, freeze_aligner=False)
    adapter = train(tmp_path / "checkpoint-1", vision_base, settings=settings)
    merged = merge(adapter)
    assert merged.parity.medium == "picture"
    assert merged.parity.difference <= merged.parity.tolerance < merged.parity.effect
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (vision_base / name).exists():
            assert (merged.path / name).read_bytes() == (vision_base / name).read_bytes()
    assert load_model(str(merged.path)).notices == ()

    def spoil_the_tower(index: Any, tensors: Any, directory: Path) -> list[str]:
        spoilt = ((n, t * 1.2 if "visual" in n and "qkv.weight" in n else t) for n, t in tensors)
        return write(index, spoilt, directory)

    write = merging.write_weights
    monkeypatch.setattr(merging, "write_weights", spoil_the_tower)
    other = tmp_path / "checkpoint-2"
    adapter.rename(other)
    with pytest.raises(ParityError):
        merge(other)
    assert "checkpoint-2-merged" not in beside(other)


def test_adapters_on_the_ears_are_merged(tmp_path: Path, train: Train) -> None:
    base = make_tiny_audio_model(tmp_path / "base", init_std=0.2)
    settings = TunerSettings(lora_rank=4, freeze_vit=False, freeze_aligner=False)
    merged = merge(train(tmp_path / "checkpoint-1", base, settings=settings))
    assert merged.parity.medium == "sound"
    assert merged.parity.difference <= merged.parity.tolerance < merged.parity.effect
    assert load_model(str(merged.path)).notices == ()
