"""The processor of a model that takes media: to the model's inputs, and their placeholders in the tokens.

The processor itself writes as many placeholder tokens as the model makes features of a picture, video or
sound; nothing here knows a model's family. Processors are passed in; nothing here imports Transformers.
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
from raytune_rl.data.example import FileRef, Message
from raytune_rl.data.media import MediaError, decode_image, shown
from raytune_rl.data.media_table import Medium
from raytune_rl.data.media_tags import MODALITIES, TAGS, modalities_of
from raytune_rl.data.sound import decode_audio
from raytune_rl.data.video import Video, decode_video, video_of_frames
from raytune_rl.errors import DataError, ModelError
from raytune_rl.protocol.media import DEFAULT_FPS, NO_LIMITS, MediaLimits, Modality

if TYPE_CHECKING:
    import torch

# What a processor returns for the text; whatever else it returns belongs to the media.
_OF_TEXT = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets"}
# One number a token saying which are placeholders, under the names that families have for it.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
# The type of a modality's placeholders, as Transformers numbers them.
_TYPE_OF = {modality: number for number, modality in enumerate(MODALITIES.values(), 1)}
_TAG_OF = {modality: TAGS[column] for column, modality in MODALITIES.items()}


@dataclass(frozen=True)
class Decoded:
    """A medium ready for the processor: an RGB picture, the frames of a video, or samples of sound (float32,
    one channel, at the processor's rate)."""

    modality: Modality
    content: Image.Image | Video | NDArray[np.float32]


@dataclass(frozen=True)
class ExpandedText:
    """A text with its placeholders expanded and tokenized.

    Attributes:
        tokens: int32 `[n]`.
        engine_prompt_ids: int32, the text's tokens before its placeholders were expanded.
        places: int64 `[n, 2]`, where each token begins and ends in the expanded text.
        gains: For each medium, (end of its placeholder in the given text, characters that it grew by).
        inside: bool `[n]`, the tokens that were written for media.
    """

    tokens: NDArray[np.int32]
    engine_prompt_ids: NDArray[np.int32]
    places: NDArray[np.int64]
    gains: tuple[tuple[int, int], ...]
    inside: NDArray[np.bool_]

    def shifted(self, position: int) -> int:
        """A position of the given text (not inside a placeholder) in the expanded one."""
        return position + sum(gain for end, gain in self.gains if end <= position)


@dataclass(frozen=True)
class MediaProcessor:
    """A Transformers processor with a part for images, videos or audio, and a fast tokenizer.

    Attributes:
        processor: The processor.
        limits: What is left to be done before the processor sees the media; what it does itself is None here.
    """

    processor: Any
    limits: MediaLimits = NO_LIMITS

    @classmethod
    def of(cls, processor: Any, limits: MediaLimits = NO_LIMITS) -> MediaProcessor:
        """Tries the processor on a small medium of its first modality.

        Args:
            processor: As loaded; `max_pixels` and `fps` are set in it if it knows such limits (Qwen's do).
            limits: What the user asks for.

        Raises:
            ModelError: The processor does not tell what it makes of text and media, or the model needs
                inputs that are not carried here; or a limit is not one that it can keep.
        """
        made = cls(processor, _set_limits(processor, limits))
        if (problem := made._problem(made.modalities[0])) is not None:
            raise ModelError(problem)
        return made

    @cached_property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities that it has a part for."""
        return modalities_of(self.processor)

    @cached_property
    def chat(self) -> ChatTemplate:
        """How it writes conversations."""
        return ChatTemplate.of(self.processor.tokenizer, self.processor)

    def refusal(self, modality: Modality) -> str | None:
        """Why rows with media of a modality cannot be used with this model; None if they can."""
        if modality not in self._refusals:
            taken = " and ".join(f"{one}s" for one in self.modalities)
            self._refusals[modality] = (
                self._problem(modality)
                if modality in self.modalities
                else f"the row has {modality}s, but the model takes {taken} only"
            )
        return self._refusals[modality]

    @cached_property
    def _refusals(self) -> dict[Modality, str | None]:
        return {}

    def sample(self, modalities: Sequence[Modality]) -> tuple[NDArray[np.int32], list[Decoded]]:
        """A short prompt with one small medium of each of the modalities: its tokens, and the media."""
        text, media = self._probe(modalities)
        return self.expand(text, media).tokens, media

    def placeholder(self, modality: Modality) -> str | None:
        """The placeholder of a modality in a text before it is expanded."""
        return getattr(self.processor, f"{modality}_token", None)

    def read(self, medium: Medium) -> Decoded:
        """A medium of the table, read and decoded; errors as of `StoredFile.read` and `decode`."""
        names = [file.name for file in medium.files]
        return self.decode(medium.modality, medium.read(), names, as_frames=medium.as_frames)

    def decode(
        self, modality: Modality, files: Sequence[bytes], names: Sequence[FileRef], *, as_frames: bool = False
    ) -> Decoded:
        """A medium ready for the processor.

        Args:
            modality: What it is.
            files: The bytes of its file, or of its frames' files.
            names: What errors call these.
            as_frames: Whether it is a video given as its frames.

        Raises:
            MediaError: The bytes cannot be decoded.
        """
        if modality == "image":
            return Decoded(modality, decode_image(files[0], names[0], self.limits.max_pixels))
        if modality == "audio":
            samples = decode_audio(files[0], names[0], self._sampling_rate)
            if self._most_samples is not None and len(samples) > self._most_samples:
                most, length = (count / self._sampling_rate for count in (self._most_samples, len(samples)))
                raise MediaError(
                    f"audio {shown(names[0])} lasts {length:.1f} s, and the model hears {most:g} s: the rest "
                    "would be cut off; cut it yourself, or split the row"
                )
            return Decoded(modality, samples)
        pixels = self.limits.video_max_pixels
        if as_frames:
            frames = [decode_image(data, name) for data, name in zip(files, names, strict=True)]
            return Decoded(modality, video_of_frames(frames, self.limits.fps or DEFAULT_FPS, pixels))
        return Decoded(modality, decode_video(files[0], names[0], self._choose_frames, pixels))

    def expand(self, text: str, media: Sequence[Decoded]) -> ExpandedText:
        """Expands the placeholders of a rendered conversation, one for each medium, and tokenizes it.

        Raises:
            DataError: The text has another number of placeholders, the processor refuses a medium, or the
                placeholder tokens are not as many as the features.
        """
        for modality in self.modalities:
            token, count = self.placeholder(modality), sum(one.modality == modality for one in media)
            found = 0 if token is None else text.count(token)
            if found != count:
                raise DataError(
                    f"the text has {found} times the model's own {modality} token {token!r} for "
                    f"{count} {modality}s: the token itself must not stand in a row's text"
                )
        output = self._call(text, media)
        tokens = np.asarray(output["input_ids"][0], dtype=np.int32)
        places = np.asarray(output["offset_mapping"][0], dtype=np.int64).reshape(-1, 2)
        replaced = output["text_replacement_offsets"][0]
        inside = np.zeros(len(tokens), dtype=np.bool_)
        for one in replaced:
            start, end = one["new_span"]
            inside |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > places[:, 0])
        self.check_features(output, self.token_types(tokens), "the row's")
        gains = tuple(
            (one["span"][1], (one["new_span"][1] - one["new_span"][0]) - (one["span"][1] - one["span"][0]))
            for one in replaced
        )
        engine_prompt_ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ExpandedText(tokens, np.asarray(engine_prompt_ids, dtype=np.int32), places, gains, inside)

    def pixels(self, rows: Sequence[Sequence[Decoded]]) -> dict[str, torch.Tensor]:
        """The model's inputs for the media of some rows, each with at least one: pixel_values, input_features
        and what goes with them."""
        options: dict[str, Any] = {}
        if any(one.modality != "image" for row in rows for one in row):
            # Some ask for the text beside anything but images: to know their order.
            texts = ["".join(str(self.placeholder(one.modality)) for one in row) for row in rows]
            options = {"text": texts, "text_kwargs": {"padding": True}}
        output = self.processor(**self._arguments(rows), **options, return_tensors="pt")
        return {name: value for name, value in output.items() if name not in {*_OF_TEXT, *_TOKEN_TYPES}}

    def token_types(self, tokens: NDArray) -> NDArray[np.int64]:
        """1 for image placeholders, 2 for video, 3 for audio, 0 for text; int64 in the shape of `tokens`."""
        types = np.zeros(tokens.shape, dtype=np.int64)
        for modality, number in _TYPE_OF.items():
            types[np.isin(tokens, self._ids(modality))] = number
        return types

    @cached_property
    def placeholder_ids(self) -> tuple[int, ...]:
        """All tokens that stand for features of images, videos or audio. A completion must have none: there
        would be nothing to put in its place."""
        return tuple(sorted({token for modality in _TYPE_OF for token in self._ids(modality)}))

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """Those tokens as texts, and each `placeholder`: none may stand in a row's own text."""
        tokens = self.processor.tokenizer.convert_ids_to_tokens(list(self.placeholder_ids))
        own = [token for modality in self.modalities if (token := self.placeholder(modality))]
        return tuple(dict.fromkeys([*tokens, *own]))

    @cached_property
    def type_name(self) -> str | None:
        """The name under which the model takes `token_types`, if it does."""
        output = self._call(*self._probe(self.modalities[:1]))
        for name in _TOKEN_TYPES:
            if name in output:
                tokens = np.asarray(output["input_ids"][0])
                return name if np.array_equal(output[name][0], self.token_types(tokens)) else None
        return None

    def check_features(self, output: Mapping[str, Any], types: NDArray[np.int64], whose: str) -> None:
        """Compares features and placeholders, where the processor's output tells (a grid of patches);
        elsewhere the model's own check is the only one.

        Args:
            output: Of the processor; also that of `pixels`.
            types: As of `token_types`.
            whose: For the message: the row's or the micro-batch's.

        Raises:
            DataError: The model would make another number of features than there are placeholders.
        """
        for modality in ("image", "video"):
            grid = output.get(f"{modality}_grid_thw")
            merge = getattr(getattr(self.processor, f"{modality}_processor", None), "merge_size", None)
            if merge is None or (grid is None and output):
                continue
            features = 0 if grid is None else int(np.asarray(grid).prod(-1).sum()) // merge**2
            written = int((types == _TYPE_OF[modality]).sum())
            if features != written:
                raise DataError(
                    f"{written} {modality} tokens for {features} features of {whose} {modality}s; was the "
                    "data "
                    "tokenized with another processor or other limits (--max_pixels)?"
                )

    @property
    def _extractor(self) -> Any:
        parts = (getattr(self.processor, name, None) for name in ("audio_processor", "feature_extractor"))
        return next(part for part in parts if part is not None)

    @property
    def _sampling_rate(self) -> int:
        return int(self._extractor.sampling_rate)

    @property
    def _most_samples(self) -> int | None:
        """Where the processor cuts a longer sound, as Whisper's does unless told otherwise."""
        kwargs = getattr(type(self.processor), "valid_processor_kwargs", None)
        defaults = getattr(kwargs, "_defaults", {}).get("audio_kwargs", {})
        return getattr(self._extractor, "n_samples", None) if defaults.get("truncation", True) else None

    def _choose_frames(self, metadata: dict[str, Any]) -> list[int]:
        """The frames of a video by the processor's own rule."""
        part = self.processor.video_processor
        facts = _Facts(metadata)
        own = getattr(part, "fps", None) is not None or getattr(part, "num_frames", None) is not None
        asked = {} if own else {"fps": min(DEFAULT_FPS, metadata["fps"])}
        try:
            chosen = part.sample_frames(metadata=facts, **asked)
            most = self.limits.fps_max_frames
            if most is not None and len(chosen) > most:
                chosen = np.linspace(0, metadata["total_num_frames"] - 1, most).round()
        except (ValueError, ZeroDivisionError):
            chosen = ()
        # A video with fewer frames than the rule asks for is shown whole.
        return [int(number) for number in chosen] or list(range(metadata["total_num_frames"]))

    def _ids(self, modality: Modality) -> list[int]:
        """The tokens that stand for features of a kind."""
        listed = getattr(self.processor, f"{modality}_token_ids", None) or ()
        return [token for token in listed if token is not None]

    def _call(self, text: str, media: Sequence[Decoded]) -> Mapping[str, Any]:
        try:
            return self.processor(
                text=[text],
                **self._arguments([media]),
                add_special_tokens=False,  # the template writes them
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except Exception as error:  # foreign code, and what it raises for a strange picture is not documented
            raise DataError(f"the processor refuses the row: {error}") from error

    def _arguments(self, rows: Sequence[Sequence[Decoded]]) -> dict[str, Any]:
        """The media as a processor takes them: images a row, videos and sounds one after the other."""
        images = [[one.content for one in row if one.modality == "image"] for row in rows]
        videos = [one.content for row in rows for one in row if isinstance(one.content, Video)]
        sounds = [one.content for row in rows for one in row if one.modality == "audio"]
        arguments: dict[str, Any] = {"images": images} if any(images) else {}
        if videos:
            arguments["videos"] = [video.frames for video in videos]
            arguments["video_metadata"] = [video.metadata for video in videos]
            arguments["do_sample_frames"] = False
        if sounds:
            arguments |= {"audio": sounds, "sampling_rate": self._sampling_rate}
        return arguments

    def _probe(self, modalities: Sequence[Modality]) -> tuple[str, list[Decoded]]:
        tags = "".join(_TAG_OF[modality] for modality in modalities)
        text = self.chat.render([Message("user", f"{tags}.")], generation_prompt=False)
        grey = Image.new("RGB", (56, 56), (127, 127, 127))
        contents: dict[Modality, Any] = {"image": grey}
        if "video" in modalities:
            contents["video"] = video_of_frames([grey] * 4, DEFAULT_FPS)
        if "audio" in modalities:
            contents["audio"] = np.zeros(self._sampling_rate // 4, dtype=np.float32)
        return text, [Decoded(modality, contents[modality]) for modality in modalities]

    def _problem(self, modality: Modality) -> str | None:
        """Why the processor cannot be used for media of a modality, found by trying it."""
        name = type(self.processor).__name__
        text, media = self._probe([modality])
        try:
            output = self._call(text, media)
        except DataError as error:
            return f"{name} cannot be used for training with {modality}s: {error}"
        untold = {"offset_mapping", "text_replacement_offsets"} - output.keys()
        if untold:
            return (
                f"{name} does not return {' and '.join(sorted(untold))}, so that what is trained on cannot "
                f"be told from what stands for {modality}s. It needs a fast tokenizer and a processor as "
                "Transformers 5 has them"
            )
        carried = self.pixels([media]).keys() | _OF_TEXT | set(_TOKEN_TYPES)
        if other := sorted(output.keys() - carried):
            return (
                f"{name} makes {', '.join(other)} out of text and {modality}s together, which raytune_rl "
                "does "
                "not carry to the model yet"
            )
        return None


class _Facts(dict[str, Any]):
    """The metadata of a video, for processors that read it as attributes or as items."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _set_limits(processor: Any, limits: MediaLimits) -> MediaLimits:
    """Sets the limits that the processor's parts know themselves, and returns the others."""
    rest = dict(vars(limits))
    images, videos = (getattr(processor, f"{modality}_processor", None) for modality in ("image", "video"))
    if limits.max_pixels is not None and images is not None and "max_pixels" in _known(images):
        _check_least("--max_pixels", limits.max_pixels, images)
        processor.image_processor = type(images).from_dict(images.to_dict(), max_pixels=limits.max_pixels)
        rest["max_pixels"] = None
    if videos is None:
        return MediaLimits(**rest)
    if limits.video_max_pixels is not None and "max_pixels" in _known(videos):
        _check_least("--video_max_pixels", limits.video_max_pixels, videos)
    own: dict[str, Any] = {}
    if limits.fps is not None:
        own |= {"fps": limits.fps, "num_frames": None}
    if limits.fps_max_frames is not None and "max_frames" in _known(videos):
        own["max_frames"] = limits.fps_max_frames
        if getattr(videos, "min_frames", None) is not None:
            own["min_frames"] = min(videos.min_frames, limits.fps_max_frames)
    if own:
        processor.video_processor = type(videos).from_dict({**videos.to_dict(), **own})
    return MediaLimits(**rest)


def _known(part: Any) -> Mapping[str, Any]:
    return getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})


def _check_least(flag: str, asked: int, part: Any) -> None:
    least = part.size["shortest_edge"]
    if asked < least:
        raise ModelError(
            f"{flag} {asked} is below the {least} pixels that the model's processor enlarges every picture "
            "or frame to"
        )
