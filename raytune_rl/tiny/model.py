"""A Qwen2 of 2.5 M parameters, made from a configuration: random weights, a real tokenizer, no download."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from raytune_rl.errors import ModelError
from raytune_rl.tiny.tokenizer import END_OF_TEXT, IM_END, VOCAB_SIZE, make_tiny_tokenizer

RECIPE_FILE = "tiny.json"


def make_tiny_model(
    directory: str | Path,
    *,
    tied: bool = True,
    hidden: int = 256,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
    max_position: int = 1024,
    init_std: float = 0.06,
) -> Path:
    """Writes a randomly initialised Qwen2 (float32 safetensors), its tokenizer and its generation settings.

    Calling it again with the same arguments leaves the directory as it is. The caller's random
    state is not touched.

    Args:
        directory: Where to write; appears whole or not at all.
        tied: Whether the output head shares the input embedding's weights.
        hidden: Model width; the feed-forward width is twice that.
        layers: Decoder layers.
        heads: Query heads; `hidden` must be divisible by it.
        kv_heads: Key-value heads; must divide `heads`.
        seed: Of the weights.
        max_position: Longest sequence in tokens.
        init_std: Standard deviation of the initial weights. About `1/sqrt(hidden)` learns soonest;
            larger values give sharper, less uniform samples.

    Returns:
        The directory.

    Raises:
        ModelError: The sizes do not fit together, or the directory holds something else.
    """
    root = Path(directory)
    recipe: dict[str, object] = {
        "tied": tied,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "seed": seed,
        "max_position": max_position,
        "init_std": init_std,
    }
    if hidden % heads or heads % kv_heads:
        raise ModelError(
            f"hidden={hidden}, heads={heads}, kv_heads={kv_heads} do not fit together: hidden must be a "
            "multiple of heads, and heads a multiple of kv_heads."
        )
    return write_once(root, recipe, lambda aside: _write(aside, recipe))


def write_once(root: Path, recipe: dict[str, object], write: Callable[[Path], None]) -> Path:
    """Makes a model's directory, whole or not at all, unless it is there already.

    Args:
        root: The directory.
        recipe: What it is made from; lies beside the model and tells whether it has to be made again.
        write: Fills the directory it is given.

    Returns:
        The directory.

    Raises:
        ModelError: It holds something else.
    """
    if _is_made(root, recipe):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        write(aside)
        (aside / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        aside.chmod(0o755)
        if root.is_dir():
            root.rmdir()  # Empty, as _is_made has seen; os.rename needs it gone on some platforms.
        aside.rename(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def _write(directory: Path, recipe: dict[str, Any]) -> None:
    tokenizer = make_tiny_tokenizer()
    eos, pad = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe["hidden"],
        intermediate_size=2 * recipe["hidden"],
        num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"],
        num_key_value_heads=recipe["kv_heads"],
        max_position_embeddings=recipe["max_position"],
        tie_word_embeddings=recipe["tied"],
        initializer_range=recipe["init_std"],
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = drawn(Qwen2ForCausalLM, config, seed=recipe["seed"], eos=eos, pad=pad)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def drawn(model_class: Any, config: Any, *, seed: Any, eos: int, pad: int) -> Any:
    """A model of a Transformers class with random float32 weights, which samples when it generates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True)
    return model


def _is_made(root: Path, recipe: dict[str, object]) -> bool:
    """Whether `root` already holds this very model; False if there is nothing there."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = root / RECIPE_FILE
    if found.is_file() and json.loads(found.read_text(encoding="utf-8")) == recipe:
        return True
    raise ModelError(
        f"{root} exists and was not made by this program with these arguments; nothing was overwritten. "
        "Give another directory, or remove this one."
    )
