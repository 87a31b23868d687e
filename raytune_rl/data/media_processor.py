"""The processor of a vision model: pictures to the model's inputs, and their placeholders in the tokens.

The processor itself writes as many placeholder tokens as the model makes features of a picture; nothing here
knows a model's family. Processors are passed in; nothing here imports Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.example import MediaRef, Message
from raytune_rl.data.media import decode_image
from raytune_rl.data.media_tags import TAGS
from raytune_rl.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

# What a processor returns for the text; whatever else it returns belongs to the pictures.
_OF_TEXT = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets"}
# One number a token saying which are placeholders, under the names that families have for it.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# Where a processor lists the tokens that stand for features, in the order of their types.
_PLACEHOLDERS = ("image_token_ids", "video_token_ids", "audio_token_ids")


@dataclass(frozen=True)
class ExpandedText:
    """A text with its placeholders expanded and tokenized.

    Attributes:
        tokens: int32 `[n]`.
        given: int32, the text's tokens before its placeholders were expanded.
        places: int64 `[n, 2]`, where each token begins and ends in the expanded text.
        gains: For each picture, (end of its placeholder in the given text, characters that it grew by).
        inside: bool `[n]`, the tokens that were written for pictures.
    """

    tokens: NDArray[np.int32]
    given: NDArray[np.int32]
    places: NDArray[np.int64]
    gains: tuple[tuple[int, int], ...]
    inside: NDArray[np.bool_]

    def shifted(self, position: int) -> int:
        """A position of the given text (not inside a placeholder) in the expanded one."""
        return position + sum(gain for end, gain in self.gains if end <= position)


@dataclass(frozen=True)
class MediaProcessor:
    """A Transformers processor with an image processor and a fast tokenizer.

    Attributes:
        processor: The processor.
        max_pixels: Scale pictures down to this before the processor sees them; None if it does that itself,
            or nothing was asked.
    """

    processor: Any
    max_pixels: int | None = None

    @classmethod
    def of(cls, processor: Any, max_pixels: int | None = None) -> MediaProcessor:
        """Tries the processor on a small picture.

        Args:
            processor: As loaded; `max_pixels` is set in it if it knows such a limit (Qwen's do).
            max_pixels: Most pixels of a picture, or None for the processor's own limit.

        Raises:
            ModelError: The processor does not tell what it makes of text and pictures, or the model needs
                inputs that are not carried here.
        """
        if max_pixels is not None and _set_limit(processor, max_pixels):
            max_pixels = None
        made = cls(processor, max_pixels)
        made._check()
        return made

    @cached_property
    def chat(self) -> ChatTemplate:
        """How it writes conversations."""
        return ChatTemplate.of(self.processor.tokenizer, self.processor)

    @cached_property
    def sample(self) -> tuple[NDArray[np.int32], Image.Image]:
        """A short prompt with one small picture: tokens, and the picture."""
        text, (picture,) = self._probe()
        return self.expand(text, [picture]).tokens, picture

    @property
    def placeholder(self) -> str | None:
        """What stands for a picture in a text before it is expanded."""
        return getattr(self.processor, "image_token", None)

    def decode(self, data: bytes, name: MediaRef) -> Image.Image:
        """A picture ready for the processor; arguments and errors as in `media.decode_image`."""
        return decode_image(data, name, self.max_pixels)

    def expand(self, text: str, images: Sequence[Image.Image]) -> ExpandedText:
        """Expands the placeholders of a rendered conversation, one for each picture, and tokenizes it.

        Raises:
            DataError: The text has another number of placeholders, the processor refuses a picture, or the
                placeholder tokens are not as many as the features.
        """
        found = 0 if self.placeholder is None else text.count(self.placeholder)
        if found != len(images):
            raise DataError(
                f"the text has {found} times the model's own image token {self.placeholder!r} for "
                f"{len(images)} images: the token itself must not stand in a row's text"
            )
        output = self._call(text, images)
        tokens = np.asarray(output["input_ids"][0], dtype=np.int32)
        places = np.asarray(output["offset_mapping"][0], dtype=np.int64).reshape(-1, 2)
        replaced = output["text_replacement_offsets"][0]
        inside = np.zeros(len(tokens), dtype=np.bool_)
        for one in replaced:
            start, end = one["new_span"]
            inside |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
        features = self.count_features(output)
        written = int(self.token_types(tokens).sum())
        if features is not None and features != written:
            raise DataError(
                f"the processor wrote {written} image tokens, but the model makes {features} features of the "
                "row's images"
            )
        gains = tuple(
            (one["span"][1], (one["new_span"][1] - one["new_span"][0]) - (one["span"][1] - one["span"][0]))
            for one in replaced
        )
        given = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ExpandedText(tokens, np.asarray(given, dtype=np.int32), places, gains, inside)

    def pixels(self, rows: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """The model's inputs for the pictures of some rows, each with at least one: pixel_values and what
        goes with them."""
        output = self.processor(images=[list(row) for row in rows], return_tensors="pt")
        return {name: value for name, value in output.items() if name not in {*_OF_TEXT, *_TOKEN_TYPES}}

    def token_types(self, tokens: NDArray) -> NDArray[np.int64]:
        """1 for image placeholders, 2 for video, 3 for audio, 0 for text; int64 in the shape of `tokens`."""
        types = np.zeros(tokens.shape, dtype=np.int64)
        for number, name in enumerate(_PLACEHOLDERS, 1):
            types[np.isin(tokens, self._ids(name))] = number
        return types

    @cached_property
    def placeholder_ids(self) -> tuple[int, ...]:
        """All tokens that stand for features of images, videos or audio. A completion must have none: there
        would be nothing to put in its place."""
        return tuple(sorted({token for name in _PLACEHOLDERS for token in self._ids(name)}))

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Those tokens as texts, and `placeholder`: none may stand in a row's own text."""
        tokens = self.processor.tokenizer.convert_ids_to_tokens(list(self.placeholder_ids))
        return tuple(dict.fromkeys([*tokens, *([self.placeholder] if self.placeholder else [])]))

    @cached_property
    def type_name(self) -> str | None:
        """The name under which the model takes `token_types`, if it does."""
        output = self._call(*self._probe())
        for name in _TOKEN_TYPES:
            if name in output:
                tokens = np.asarray(output["input_ids"][0])
                return name if np.array_equal(output[name][0], self.token_types(tokens)) else None
        return None

    def count_features(self, output: Mapping[str, Any]) -> int | None:
        """How many features the model makes of the pictures, where the processor's output tells (a grid of
        patches); else None, and the model's own check is the only one."""
        grid = output.get("image_grid_thw")
        merge = getattr(self.processor.image_processor, "merge_size", None)
        if grid is None or merge is None:
            return None
        return int(np.asarray(grid).prod(-1).sum()) // merge**2

    def _ids(self, name: str) -> list[int]:
        return [token for token in getattr(self.processor, name, None) or () if token is not None]

    def _call(self, text: str, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        try:
            return self.processor(
                text=[text],
                images=[list(images)] if images else None,
                add_special_tokens=False,  # the template writes them
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except Exception as error:  # foreign code, and what it raises for a strange picture is not documented
            raise DataError(f"the processor refuses the row: {error}") from error

    def _probe(self) -> tuple[str, list[Image.Image]]:
        text = self.chat.render([Message("user", f"{TAGS['images']}.")], generation_prompt=False)
        return text, [Image.new("RGB", (56, 56), (127, 127, 127))]

    def _check(self) -> None:
        name = type(self.processor).__name__
        try:
            output = self._call(*self._probe())
        except DataError as error:
            raise ModelError(f"{name} cannot be used for training with images: {error}") from error
        untold = {"offset_mapping", "text_replacement_offsets"} - output.keys()
        if untold:
            raise ModelError(
                f"{name} does not return {' and '.join(sorted(untold))}, so that what is trained on cannot "
                "be told from what stands for images. It needs a fast tokenizer and a processor of the kind "
                "that Transformers 5 has"
            )
        carried = self.pixels([self._probe()[1]]).keys() | _OF_TEXT | set(_TOKEN_TYPES)
        if other := sorted(output.keys() - carried):
            raise ModelError(
                f"{name} makes {', '.join(other)} out of text and images together, which raytune_rl does not "
                "carry to the model yet"
            )


def _set_limit(processor: Any, max_pixels: int) -> bool:
    """Sets the image processor's own limit; False if it has none."""
    images = processor.image_processor
    if "max_pixels" not in getattr(getattr(images, "valid_kwargs", None), "__annotations__", {}):
        return False
    least = images.size["shortest_edge"]
    if max_pixels < least:
        raise ModelError(
            f"--max_pixels {max_pixels} is below the {least} pixels that the model's image processor "
            "enlarges every picture to"
        )
    processor.image_processor = type(images).from_dict(images.to_dict(), max_pixels=max_pixels)
    return True
