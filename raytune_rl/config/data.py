"""Which rows, and what becomes of them before training."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Data")


class IdentityOptions(Options):
    """Who the model is to say that it is."""

    model_name: tuple[str, ...] = _setting(
        (),
        "What the model is called, where rows leave it open ({{NAME}} in swift/self-cognition): once, or in "
        "Chinese and in English.",
        max_length=2,
    )
    model_author: tuple[str, ...] = _setting(
        (), "Who made it ({{AUTHOR}}), written like --model_name.", max_length=2
    )


class DataOptions(IdentityOptions):
    """Data sets and how rows are read, encoded and ordered."""

    dataset: tuple[str, ...] = _setting(
        (), "Training data: files, folders or hub ids, each with optional :subset, [split] and #rows."
    )
    val_dataset: tuple[str, ...] = _setting((), "Validation data, written like --dataset.")
    split_dataset_ratio: float = _setting(
        0.0, "Share of the training rows set aside for validation when there is no --val_dataset.", ge=0, lt=1
    )
    columns: dict[str, str] = _setting(
        {},
        'Columns to rename, as JSON: \'{"name in the file": "name that is meant"}\'. An object in the column '
        'chat_template_kwargs ({"enable_thinking": false}) goes to the chat template with its row.',
    )
    system: str | None = _setting(
        None, "System prompt for rows without one of their own: the text, or the path of a .txt file."
    )
    max_length: int | None = _setting(
        None,
        "Longest row in tokens; in online RL the longest prompt. Not set: what the model can hold.",
        ge=1,
    )
    truncation_strategy: Literal["delete", "left", "right"] | None = _setting(
        None,
        "What to do with a row over --max_length: leave it out (counted), or cut its left or right end. "
        "Not set: delete in SFT, left in online RL.",
    )
    strict: bool = _setting(
        True,
        "true: a row that cannot be used stops the run with its file and line. "
        "false: it goes to a quarantine file with the reason, and is counted.",
    )
    max_pixels: int | None = _setting(
        None,
        "Vision models: most pixels of an image; larger ones are scaled down. An image processor that has "
        "such a limit keeps this one in the checkpoint. Not set: the processor's own.",
        ge=1,
    )
    video_max_pixels: int | None = _setting(
        None,
        "Most pixels of a frame of a video; larger frames are scaled down. Not set: the processor's own.",
        ge=1,
    )
    fps: float | None = _setting(
        None,
        "Frames shown of a second of video. A video given as a list of frames is shown whole, and is taken "
        "to have so many of them a second. Not set: the processor's own, else 2.",
        gt=0,
    )
    fps_max_frames: int | None = _setting(
        None,
        "Most frames shown of a video; of a longer one, so many at equal distances. Not set: the "
        "processor's own.",
        ge=1,
    )
    root_image_dir: str | None = _setting(
        None, "Folder that relative paths of images, videos and audios start from. Not set: the current one."
    )
    inline_media: bool | None = _setting(
        None,
        "true: files of images, videos and audios travel to the workers with the rows. false: their paths "
        "do, and every machine must see the files. Not set: true on a cluster that was running before, false "
        "on one started here.",
    )
    dataset_shuffle: bool = _setting(True, "Shuffle the training rows anew in each epoch.")
    data_seed: int = _setting(42, "Seed of the order of rows and of every draw from the data.", ge=0)
    dataset_num_proc: int = _setting(
        1, "Processes that encode rows, once one has been at it for some seconds.", ge=1
    )
    load_from_cache_file: bool = _setting(
        True,
        "SFT and preferences: take from disk what an earlier run encoded of the same files, model and "
        "settings. false: encode anew.",
    )
    dataset_cache_dir: str | None = _setting(
        None,
        "SFT and preferences: folder of encoded rows, about as large as the data; what lies in it may be "
        "deleted, and goes when no run has begun with it for 30 days. Not set: RAYTUNE_RL_CACHE, "
        "else ~/.cache/raytune_rl.",
    )
    dataloader_num_workers: int | None = _setting(
        None,
        "Models that take media: threads per policy worker that make the pixels of coming micro-batches. "
        "Not set: 1.",
        ge=0,
    )

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.val_dataset and self.split_dataset_ratio > 0:
            raise ConfigError(
                "--val_dataset and --split_dataset_ratio both name the validation rows: give only one of the "
                "two."
            )
        return self
