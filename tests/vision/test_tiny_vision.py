"""The toy vision model is a Qwen2.5-VL for Transformers and for vLLM; its pictures are the same each time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from raytune_rl.errors import ModelError
from raytune_rl.tiny.shapes import COLOURS, ShapeFiles, write_shapes
from raytune_rl.tiny.vision import make_tiny_vision_model


def test_size_and_kind_are_as_promised(tiny_vl: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_vl)
    processor = AutoProcessor.from_pretrained(tiny_vl)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert 0.6e6 < model.num_parameters() < 0.8e6
    assert model.config.image_token_id == processor.image_token_id
    text = model.config.get_text_config()
    assert text.hidden_size // text.num_attention_heads >= 32, "vLLM's CPU kernels need it"


def test_made_once_and_never_over_something_else(tiny_vl: Path, tmp_path: Path) -> None:
    weights = tiny_vl / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert make_tiny_vision_model(tiny_vl) == tiny_vl
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(ModelError, match="nothing was overwritten"):
        make_tiny_vision_model(tiny_vl, seed=3)
    again = make_tiny_vision_model(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == weights.read_bytes()


def test_pictures_are_deterministic_and_show_what_they_say(shapes: ShapeFiles, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again")

    def digest(files: ShapeFiles) -> str:
        return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files.images.iterdir()))).hexdigest()

    assert digest(again) == digest(shapes)
    rows = [json.loads(line) for line in shapes.rl.read_text().splitlines()]
    assert {"image", "problem", "solution"} == rows[0].keys()
    for row in rows[:20]:
        colour = row["solution"].split()[0]
        assert COLOURS[colour] in {value for _, value in Image.open(row["image"]).getcolors()}


@pytest.mark.cluster
def test_vllm_reads_the_picture_as_transformers_does(tiny_vl: Path, shapes: ShapeFiles) -> None:
    row = json.loads(shapes.sft.read_text().splitlines()[0])
    picture = row["images"][0]
    processor = AutoProcessor.from_pretrained(tiny_vl)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which shape is it?"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)

    script = Path(__file__).with_name("vllm_answer.py")
    command = [sys.executable, str(script), str(tiny_vl), picture, prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])

    inputs = processor(text=[prompt], images=[[Image.open(picture)]], return_tensors="pt")
    assert answer["prompt"] == inputs["input_ids"][0].tolist(), "the same placeholders"
    model = AutoModelForImageTextToText.from_pretrained(tiny_vl).eval()
    answer_ids = torch.tensor([answer["tokens"]])
    with torch.no_grad():
        ids = torch.cat([inputs.pop("input_ids"), answer_ids], 1)
        inputs.pop("attention_mask")
        types = torch.nn.functional.pad(inputs.pop("mm_token_type_ids"), (0, answer_ids.shape[1]))
        logits = model(input_ids=ids, mm_token_type_ids=types, **inputs).logits[
            0, -answer_ids.shape[1] - 1 : -1
        ]
    mine = logits.log_softmax(-1).gather(-1, answer_ids[0, :, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), mine, atol=2e-3, rtol=0)
