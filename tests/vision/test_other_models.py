"""Other families than Qwen go the same way: a fixed number of features, marked ones, and tiles."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from raytune_rl.data.encode import MediaSettings, encode_prompts, encode_sft
from raytune_rl.data.example import Example, Message
from raytune_rl.data.media_batch import MediaCollator
from raytune_rl.data.media_processor import MediaProcessor
from raytune_rl.data.media_table import media_of
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.models.tuner import apply_tuner, trains_vision
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.tiny.shapes import corpus, draw
from raytune_rl.tiny.tokenizer import make_tiny_tokenizer
from raytune_rl.tiny.vision import CHAT_TEMPLATE

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
SIDES = {"height": 56, "width": 56}


def tokenizer_of(placeholder: str, *more: str) -> Any:
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", placeholder)
    return make_tiny_tokenizer((placeholder, *more), texts=corpus(), chat_template=template)


def llava() -> tuple[Any, Any]:
    """CLIP: every picture is cropped to one square and makes 16 features."""
    tokenizer = tokenizer_of("<image>")
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=hf.Qwen2Config(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SIDES),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """SigLIP: the tokens of a picture are told to the model, which lets them see each other."""
    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokenizer = tokenizer_of(*names.values())
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            vocab_size=len(tokenizer), **TEXT, head_dim=32, sliding_window=64, query_pre_attn_scalar=32
        ),
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = hf.Gemma3ImageProcessor(size=SIDES)
    template = tokenizer.chat_template
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    return hf.Gemma3ForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    """Tiles: a picture becomes several, with texts between their tokens; rows are padded to each other."""
    marks = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = tokenizer_of("<image>", *marks, *tiles)
    config = hf.Idefics3Config(
        vision_config=VISION,
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    template = tokenizer.chat_template
    processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    return hf.Idefics3ForConditionalGeneration(config), processor


@pytest.mark.parametrize(
    ("make", "placeholders"), [(llava, [16, 0, 32]), (gemma3, [4, 0, 8]), (idefics3, [20, 0, 32])]
)
def test_mixed_rows_score_as_in_transformers(
    make: Callable[[], tuple[Any, Any]], placeholders: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = make()
    model.eval()
    vision = MediaProcessor.of(processor)
    for number, size in enumerate([(56, 56), (112, 56), (84, 140)]):
        draw("blue", "circle", random.Random(number)).resize(size).save(tmp_path / f"{number}.png")
    a, b, c = (str(tmp_path / f"{number}.png") for number in range(3))
    answer = Message("assistant", "A red square.")
    examples = [
        Example((Message("user", "<image>Which shape is it?"), answer), images=(a,)),
        Example((Message("user", "How are you?"), answer)),
        Example((Message("user", "<image> and <image>?"), answer), images=(c, b)),
    ]
    encoded = encode_sft(examples, processor.tokenizer, media=MediaSettings(vision))
    marked = [np.isin(encoded.tokens[row], vision.placeholder_ids).sum() for row in range(3)]
    assert marked == placeholders
    micro = MediaCollator(vision).collate(
        [encoded.tokens[row] for row in range(3)],
        [encoded.loss_mask[row] for row in range(3)],
        [media_of(encoded.media, row) for row in range(3)],
        pad_token_id=0,
    )
    scorer = TokenScorer(model)
    scorer.verify()
    with torch.no_grad():
        mine = scorer(
            micro.input_ids,
            micro.position_ids,
            micro.attention_mask,
            micro.predict_index,
            micro.targets,
            **micro.model_inputs,
        ).logprobs
        for row, example in enumerate(examples):
            theirs = plain(model, processor, example, encoded.tokens[row])[encoded.loss_mask[row][1:]]
            torch.testing.assert_close(mine[micro.row_of == row], theirs, atol=1e-5, rtol=0)

    asked = [Example(example.messages[:1], images=example.images) for example in examples]
    prompts = encode_prompts(asked, processor.tokenizer, media=MediaSettings(vision))
    assert prompts.engine_prompt_ids is not None
    one_each = [prompts.engine_prompt_ids[row].tolist().count(placeholder_id(vision)) for row in range(3)]
    assert one_each == [1, 0, 2]
    assert trains_vision(apply_tuner(model, TunerSettings("lora", freeze_vit=False)).model)


def placeholder_id(vision: MediaProcessor) -> int:
    return vision.processor.tokenizer.convert_tokens_to_ids(vision.placeholder("image"))


def plain(model: Any, processor: Any, example: Example, expected: np.ndarray) -> torch.Tensor:
    """Log-probs of every token after the first, from the processor's own way with a conversation."""
    turns = []
    for message in example.messages:
        parts = message.content.split("<image>")
        content = [{"type": "text", "text": parts[0]}]
        for part in parts[1:]:
            content += [{"type": "image"}, {"type": "text", "text": part}]
        turns.append({"role": message.role, "content": content})
    text = processor.apply_chat_template(turns, tokenize=False)
    images = [[Image.open(path) for path in example.images]] if example.images else None
    inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == expected.tolist()
    logits = model(**inputs).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]
