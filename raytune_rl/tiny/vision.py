"""A Qwen2.5-VL of 0.7 M parameters, made from a configuration, with its processor; no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from raytune_rl.tiny.model import drawn, write_once
from raytune_rl.tiny.shapes import corpus
from raytune_rl.tiny.tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, make_tiny_tokenizer

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_TOKENS = (VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)

# ChatML whose turns are texts or lists of parts; a picture or video is one placeholder between its
# two marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_vision_model(
    directory: str | Path,
    *,
    tied: bool = False,
    layers: int = 2,
    seed: int = 0,
    max_position: int = 1024,
    min_pixels: int = 28 * 28,
    max_pixels: int = 112 * 112,
    init_std: float = 0.06,
) -> Path:
    """Writes a randomly initialised Qwen2.5-VL (float32 safetensors), its processor and its tokenizer.

    Text: hidden 128, 4 heads of 32 (the smallest that vLLM's CPU kernels take), 2 key-value heads. Vision:
    2 blocks of hidden 64, the second with attention over the whole picture. Every linear layer is a multiple
    of 64 wide, so that NF4 works on a CPU too. A picture of 56 x 56 pixels is 4 tokens.

    Args:
        directory: Where to write; appears whole or not at all. The same arguments leave it as it is.
        tied: Whether the output head shares the input embedding's weights.
        layers: Decoder layers.
        seed: Of the weights.
        max_position: Longest sequence in tokens.
        min_pixels, max_pixels: The sizes of pictures and frames between which the processor scales.
        init_std: Standard deviation of the initial weights.

    Returns:
        The directory.

    Raises:
        ModelError: The directory holds something else.
    """
    recipe: dict[str, object] = {
        "kind": "qwen2_5_vl with videos",
        "tied": tied,
        "layers": layers,
        "seed": seed,
        "max_position": max_position,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "init_std": init_std,
    }
    return write_once(Path(directory), recipe, lambda aside: _write(aside, recipe))


def _write(directory: Path, recipe: dict[str, Any]) -> None:
    tokenizer = make_tiny_tokenizer(VISION_TOKENS, texts=corpus(), chat_template=CHAT_TEMPLATE)
    model = _model(tokenizer, recipe)
    size = {"shortest_edge": recipe["min_pixels"], "longest_edge": recipe["max_pixels"]}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _model(tokenizer: Any, recipe: dict[str, Any]) -> Any:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": recipe["layers"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": recipe["max_position"],
            "initializer_range": recipe["init_std"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": token(IM_END),
            "pad_token_id": token(END_OF_TEXT),
            "tie_word_embeddings": recipe["tied"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "initializer_range": recipe["init_std"],
        },
        tie_word_embeddings=recipe["tied"],
        image_token_id=token(IMAGE_PAD),
        video_token_id=token(VIDEO_PAD),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
    )
    eos, pad = token(IM_END), token(END_OF_TEXT)
    return drawn(Qwen2_5_VLForConditionalGeneration, config, seed=recipe["seed"], eos=eos, pad=pad)
