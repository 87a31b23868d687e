"""A Qwen2-Audio of 0.5 M parameters, made from a configuration, with its processor; no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from raytune_rl.tiny.model import drawn, write_once
from raytune_rl.tiny.shapes import corpus
from raytune_rl.tiny.tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, make_tiny_tokenizer

AUDIO, AUDIO_BEGIN, AUDIO_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"

# ChatML whose turns are texts or lists of parts; a sound is one placeholder between its two marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{{ '<|audio_bos|><|AUDIO|><|audio_eos|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SECONDS = 30
"""Every sound is padded to this length, as Whisper has it; vLLM takes no other."""


def make_tiny_audio_model(directory: str | Path, *, seed: int = 0, init_std: float = 0.06) -> Path:
    """Writes a randomly initialised Qwen2-Audio (float32 safetensors), its processor and its tokenizer.

    Text: hidden 128, 2 layers, 4 heads of 32, 2 key-value heads. Sound: 16 mel bins, 2 layers of width 64; a
    second is 25 tokens.

    Args:
        directory: Where to write; appears whole or not at all. The same arguments leave it as it is.
        seed: Of the weights.
        init_std: Standard deviation of the initial weights.

    Raises:
        ModelError: The directory holds something else.
    """
    recipe: dict[str, object] = {"kind": "qwen2_audio", "seed": seed, "init_std": init_std}
    return write_once(Path(directory), recipe, lambda aside: _write(aside, recipe))


def _write(directory: Path, recipe: dict[str, Any]) -> None:
    marks = (AUDIO_BEGIN, AUDIO_END, AUDIO)
    tokenizer = make_tiny_tokenizer(marks, texts=corpus(), chat_template=CHAT_TEMPLATE)
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    processor = Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)
    model = _model(tokenizer, recipe)
    # Transformers 5 would write the language model's names with one prefix too many for other programs.
    named = {_name_on_the_hub(name): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=named, save_original_format=False)
    processor.save_pretrained(directory)


def _name_on_the_hub(name: str) -> str:
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def _model(tokenizer: Any, recipe: dict[str, Any]) -> Any:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
            d_model=64,
            max_source_positions=50 * SECONDS,
        ),
        text_config=Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=recipe["init_std"],
            bos_token_id=None,
            eos_token_id=token(IM_END),
            pad_token_id=token(END_OF_TEXT),
        ),
        audio_token_index=token(AUDIO),
    )
    eos, pad = token(IM_END), token(END_OF_TEXT)
    return drawn(Qwen2AudioForConditionalGeneration, config, seed=recipe["seed"], eos=eos, pad=pad)
