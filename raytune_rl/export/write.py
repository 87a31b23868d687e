"""The files of a model's folder: weights in shards, and what is taken over as it is."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.model_tokens import as_ids, read_eos
from raytune_rl.errors import DataError, ModelError
from raytune_rl.export.errors import ExportError
from raytune_rl.models.adapters import untie
from raytune_rl.models.load import load_media_processor, load_tokenizer, takes_media
from raytune_rl.protocol.weights import TensorEntry

MAX_SHARD_BYTES = 5 * 10**9
# Copied byte for byte: loading and saving them again could change what they say.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
)
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_OF_THE_BASE = ("*.py", "LICENSE*", "NOTICE*")


def write_weights(
    index: Sequence[TensorEntry],
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes safetensors as Transformers names them, one shard in memory at a time.

    Args:
        index: names, shapes and dtypes of all tensors, in the order in which they come.
        tensors: the tensors; made while they are written.
        directory: exists.
        max_shard_bytes: of one file; a single larger tensor gets a file of its own.

    Returns:
        The names of the weight files.

    Raises:
        ExportError: the file system refused.
    """
    shards: list[list[TensorEntry]] = [[]]
    for spec in index:
        filled = sum(other.nbytes for other in shards[-1])
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    total = len(shards)
    names = [
        "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        for number in range(1, total + 1)
    ]
    coming = iter(tensors)
    for file, specs in zip(names, shards, strict=True):
        shard = {name: _own(tensor) for name, tensor in itertools.islice(coming, len(specs))}
        try:
            save_file(shard, directory / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{directory / file} cannot be written: {error}") from error
    if total > 1:
        weight_map = {spec.name: file for file, specs in zip(names, shards, strict=True) for spec in specs}
        size = sum(spec.nbytes for spec in index)
        document = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n")
    return names


def write_configs(
    model: Any, directory: Path, *, untied: bool = False, adapter: Path | None = None, trusted: bool = False
) -> None:
    """config.json and generation_config.json of a Transformers model.

    Args:
        model: With its adapter, if it has one.
        directory: Has its tokenizer, if that is known.
        untied: Whether head and embedding are two matrices, whatever the base's config says.
        adapter: The adapter's folder: what ends an answer by its generation_config ends one of the result.
        trusted: Run code that comes with the tokenizer.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    if untied:
        untie(config)
    config.save_pretrained(directory)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        generation = copy.deepcopy(model.generation_config)
        _stop_at_ends(generation, directory, adapter, takes_media(config), trusted)
        generation.save_pretrained(directory)


def _stop_at_ends(generation: Any, directory: Path, adapter: Path | None, media: bool, trusted: bool) -> None:
    """Adds to eos_token_id what ends an answer by the adapter's settings and by the chat template."""
    own = as_ids(generation.eos_token_id)
    listed = () if adapter is None else read_eos(adapter)
    ends: tuple[int, ...] = ()
    # A template of another program's tokenizer may be anything; the merge is right without it.
    with contextlib.suppress(ModelError, DataError):
        ends = _chat(directory, media, trusted).turn_end.stops
    ids = list(dict.fromkeys((*own, *listed, *ends)))
    if ids and ids != list(own):
        generation.eos_token_id = ids


def _chat(directory: Path, media: bool, trusted: bool) -> ChatTemplate:
    """How the folder's own tokenizer, or processor, writes conversations."""
    processor = load_media_processor(str(directory), trust_remote_code=trusted) if media else None
    if processor is not None:
        return ChatTemplate.of(processor.tokenizer, processor)
    chat = ChatTemplate.of(load_tokenizer(str(directory), trust_remote_code=trusted))
    if chat.template is not None:
        raise ModelError("the tokenizer has no chat template of its own")
    return chat


def copy_companions(adapter: Path, base: Path, directory: Path) -> list[str]:
    """Tokenizer and processor, the adapter's where it has its own, and the base's code and licence.

    Returns:
        The names of the files written.
    """
    written: list[str] = []
    written += _copy(
        adapter if (adapter / "tokenizer_config.json").is_file() else base, _TOKENIZER, directory
    )
    own_processor = any((adapter / name).is_file() for name in _PROCESSOR)
    written += _copy(adapter if own_processor else base, _PROCESSOR, directory)
    written += _copy(base, _OF_THE_BASE, directory)
    return written


def _copy(source: Path, patterns: Sequence[str], directory: Path) -> list[str]:
    copied = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or not file.is_file() or not any(_matches(name, pattern) for pattern in patterns):
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, directory / name)
        copied.append(name)
    return copied


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatch(name, pattern)


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, and not a view of something larger, which safetensors would refuse."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
