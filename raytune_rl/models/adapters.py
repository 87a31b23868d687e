"""Adapters as folders, made here or elsewhere: what is in one, and opening it on the model that it fits.

Training, export and infer all open adapters here, so that what one takes the others take too.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from raytune_rl.errors import ModelError
from raytune_rl.models.hub import first_line
from raytune_rl.models.load import auto_class, load_config
from raytune_rl.models.served import ADAPTER_CONFIG, adapter_tensors, read_adapter_config
from raytune_rl.models.sharding import is_sharded, shape_of

if TYPE_CHECKING:
    from peft import PeftModel

_PREFIX = "base_model.model."
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?Size\(\[([\d, ]*)\]\).*?Size\(\[([\d, ]*)\]\)")
# What holds a layer whole, by what follows the layer's name, and which dimension counts tokens.
_WHOLE = (".weight", ".base_layer.weight", ".token_adapter.base_layer.weight")
_LOW_RANK = {".lora_embedding_A": 1, ".lora_B.weight": 0}


def open_adapter(
    model: PreTrainedModel, path: str, *, dropout: float | None = None, resize: bool = False
) -> PeftModel:
    """An adapter on its base.

    Args:
        model: The base; if `resize` its embeddings may be resized in place.
        path: The adapter's folder: `adapter_model.safetensors` or `adapter_model.bin`, of which only tensors
            are read.
        dropout: To train with this dropout, which is no property of its weights; None: to use it.
        resize: Whether the base may take on the adapter's number of tokens, where the adapter brings
            embeddings for all of them.

    Raises:
        ModelError: It is not there, is of another kind, or does not fit.
    """
    from peft import PeftConfig, PeftModel

    directory = Path(path).expanduser()
    if not (directory / ADAPTER_CONFIG).is_file():
        raise ModelError(f"adapter '{path}' does not exist or has no {ADAPTER_CONFIG}")
    read_adapter_config(directory)
    shapes = adapter_tensors(directory)
    _fit_rows(model, path, shapes, resize)
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if dropout is not None:
            config.lora_dropout = dropout
        peft = PeftModel.from_pretrained(
            model, str(directory), is_trainable=dropout is not None, config=config
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"adapter '{path}' does not fit {type(model).__name__}: {_why(error)}") from error
    _check_names(peft, path, shapes)
    return peft


def check_fits(model: str, adapter: str, *, trust_remote_code: bool = False) -> None:
    """Opens an adapter on its base without the base's weights.

    Raises:
        ModelError: As in `open_adapter`.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights that are nowhere take none
        bare = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        open_adapter(bare, adapter)


def _why(error: Exception) -> str:
    """The reason, from an error of PEFT or torch; sizes are named."""
    sizes = _MISMATCH.findall(str(error))
    if not sizes:
        return first_line(error)
    name, theirs, ours = sizes[0]
    return (
        f"{len(sizes)} of its weights have another shape than the model's (first: "
        f"{name.replace('.default', '')} is [{theirs}], the model's [{ours}]). Was it trained on another "
        "base? Name the right one with --model"
    )


def _fit_rows(model: PreTrainedModel, path: str, shapes: Mapping[str, tuple[int, ...]], resize: bool) -> None:
    """Gives the model as many embeddings as the adapter was trained with."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, width = shape_of(embedding.weight)
    tied = head is not None and head.weight is embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    whole, found = {}, {}
    for part, module in (("embeddings", embedding), ("head", head)):
        if module is None:
            continue
        name = _PREFIX + names[id(module)]
        whole[part] = next((shapes[name + end] for end in _WHOLE if name + end in shapes), None)
        low = [shapes[name + end][at] for end, at in _LOW_RANK.items() if name + end in shapes]
        held = whole[part]
        if held is not None or low:
            found[part] = low[0] if held is None else held[0]
    other = {part: count for part, count in found.items() if count != rows}
    if not other:
        return
    count = next(iter(other.values()))
    mismatch = (
        f"adapter '{path}' was trained with {count} tokens in its {' and '.join(other)}, its base has "
        f"{rows}: tokens were {'added' if count > rows else 'taken away'}"
    )
    complete = whole.get("embeddings") is not None and (tied or head is None or whole.get("head") is not None)
    fits = all(shape is None or shape == (count, width) for shape in whole.values())
    if not fits:
        raise ModelError(
            f"{mismatch}, and the embeddings that it saved do not fit: "
            + ", ".join(f"{part} {list(shape)}" for part, shape in whole.items() if shape is not None)
            + f", the base's {[rows, width]}. Was it trained on another base? Name the right one with --model"
        )
    if not complete and count > rows:
        raise ModelError(
            f"{mismatch}, but it does not bring all of their embeddings, so nobody knows them. Save the "
            "adapter again with save_embedding_layers=True (PEFT), or name a base that has them with --model"
        )
    if not resize or is_sharded(model):
        raise ModelError(
            f"{mismatch}. Training goes on from a whole model: merge it first (raytune-rl export --adapters "
            f"{path} --merge_lora true --output_dir MERGED), which resizes the base, then use --model MERGED"
        )
    model.resize_token_embeddings(count, mean_resizing=False)


def _check_names(peft: PeftModel, path: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """PEFT leaves weights that the file lacks at their initial values, and others out, with a warning at
    most."""
    from peft import get_peft_model_state_dict

    adapter = str(peft.active_adapters[0])
    wanted = set(get_peft_model_state_dict(peft, adapter_name=adapter, save_embedding_layers=False))
    missing = sorted(wanted - shapes.keys())
    surplus = sorted(name for name in shapes.keys() - wanted if ".lora_" in name)
    for names, fault in (
        (missing, "lacks {} of the weights that the base model needs from it"),
        (surplus, "has {} weights that the base model has no place for"),
    ):
        if names:
            raise ModelError(
                f"adapter '{path}' {fault.format(len(names))} (first: {names[0]}). Is it the base that the "
                "adapter was trained on? Name the right one with --model"
            )


def head_of_its_own(model: Any) -> bool:
    """Whether a model (without adapter layers) whose config ties head and embedding has two matrices."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and ties(model.config) and head.weight is not embedding.weight


def ties(config: Any) -> bool:
    """Whether a config says that head and embedding are one matrix."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def untie(config: Any) -> None:
    """Says in a config, and in that of its text part, that head and embedding are two matrices."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
