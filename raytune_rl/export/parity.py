"""Does the written model answer as base and adapter do? Logits of both, on an input that never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from raytune_rl.errors import ModelError
from raytune_rl.export.errors import ParityError
from raytune_rl.models.hub import first_line
from raytune_rl.models.load import load_processor, load_tokenizer, takes_media

# Largest difference over the largest logit (at least 1). Merging rounds the weights once more, to their type;
# through the layers of a deep model that grows to some ten times the type's precision, while a merge that is
# wrong is off by the adapter's whole effect.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TEXT = "Solve it step by step: a train leaves at 9:40 and needs 2 hours and 35 minutes. When is it there?"
# What the processors of many models raise on an input that they do not take in this shape.
_PROCESSOR_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ImportError)


@dataclass(frozen=True)
class Probe:
    """The short input.

    Attributes:
        inputs: keyword arguments of the model's forward.
        medium: "picture" or "sound" if there is one among them.
        notices: lines for the user.
    """

    inputs: Mapping[str, Tensor]
    medium: str | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Parity:
    """The result of the comparison.

    Attributes:
        difference: largest absolute difference between the two models' logits.
        tolerance: what `difference` may be at most.
        largest: largest absolute logit of base and adapter.
        effect: by how much the adapter moves the base's logits, at most; to be seen beside `difference`.
        tokens: length of the input.
        medium: "picture" or "sound" if one was part of the input.
    """

    difference: float
    tolerance: float
    largest: float
    effect: float
    tokens: int
    medium: str | None


def make_probe(config: Any, directory: Path, *, trust_remote_code: bool) -> Probe:
    """Text by the tokenizer in `directory`, with a picture or sound where the model takes it; bare ids if
    there is none."""
    notices: list[str] = []
    if takes_media(config):
        try:
            return _with_medium(directory, trust_remote_code)
        except (ModelError, *_PROCESSOR_ERRORS) as error:
            notices.append(
                f"the merged model is compared on text alone, not on a picture or sound: {first_line(error)}"
            )
    try:
        tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
        ids = tokenizer(_TEXT, return_tensors="pt")["input_ids"]
    except (ModelError, *_PROCESSOR_ERRORS) as error:
        notices.append(f"the merged model is compared on made-up token ids: {first_line(error)}")
        ids = (torch.arange(24) * 7919 % config.get_text_config().vocab_size)[None]
    return Probe({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, tuple(notices))


@torch.no_grad()
def logits(model: nn.Module, probe: Probe) -> Tensor:
    """Float32 [tokens, vocabulary] on the CPU."""
    parameter = next(model.parameters())
    inputs = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in probe.inputs.items()
    }
    return model(**inputs, use_cache=False).logits[0].float().cpu()


def expected_logits(peft: Any, probe: Probe) -> tuple[Tensor, float]:
    """Logits of base plus adapter, and the adapter's effect on them."""
    tuned = logits(peft, probe)
    with peft.disable_adapter():
        bare = logits(peft, probe)
    return tuned, (tuned - bare).abs().max().item()


def compare(expected: Tensor, effect: float, merged: nn.Module, probe: Probe) -> Parity:
    """Compares the written model, loaded again, with what was expected of it.

    Args:
        expected: float32 [tokens, vocabulary], from `expected_logits`.
        effect: from the same.
        merged: the written model.
        probe: the same input.

    Raises:
        ParityError: the difference is above the tolerance of the weights' dtype, or not a number.
    """
    dtype = next(merged.parameters()).dtype
    largest = expected.abs().max().item()
    difference = (logits(merged, probe) - expected).abs().max().item()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(1.0, largest)
    parity = Parity(difference, tolerance, largest, effect, expected.shape[0], probe.medium)
    if not difference <= tolerance:
        raise ParityError(
            f"The merged model is not what was trained: its logits differ by up to {difference:.3g} from "
            f"those of base and adapter, where {str(dtype).removeprefix('torch.')} allows {tolerance:.3g} "
            f"(largest logit {largest:.3g}, effect of the adapter {effect:.3g}). It has been removed. Please "
            "report this."
        )
    return parity


def _with_medium(directory: Path, trust_remote_code: bool) -> Probe:
    """A picture and a text, or for a model that hears only, a sound and a text."""
    processor = load_processor(str(directory), trust_remote_code=trust_remote_code)
    given: dict[str, Any]
    if getattr(processor, "image_processor", None) is not None:
        gradient = bytes(value % 256 for y in range(56) for x in range(56) for value in (4 * x, 4 * y, x * y))
        medium, given = "picture", {"images": [Image.frombytes("RGB", (56, 56), gradient)]}
    else:
        rate = processor.feature_extractor.sampling_rate
        tone = torch.sin(torch.arange(rate // 2) * (2 * torch.pi * 440 / rate)).numpy()
        medium, given = "sound", {"audio": [tone], "sampling_rate": rate}
    content = [{"type": "image" if medium == "picture" else "audio"}, {"type": "text", "text": _TEXT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(text=[text], **given, return_tensors="pt")
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in batch.values()):
        raise ModelError(f"the processor made nothing of the {medium}")
    return Probe({name: value for name, value in batch.items() if isinstance(value, Tensor)}, medium, ())
