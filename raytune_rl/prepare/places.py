"""Where media files are, for whoever prepares rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raytune_rl.config.commands import TrainConfig


@dataclass(frozen=True)
class MediaPlaces:
    """Where media files are looked for, whether their bytes travel instead of their paths, and whether
    every worker sees the driver's files."""

    root: str
    inline: bool
    one_machine: bool

    @classmethod
    def of(cls, config: TrainConfig, one_machine: bool) -> MediaPlaces:
        """On a cluster that was started here every worker sees the driver's files; elsewhere it may not."""
        inline = config.inline_media
        root = Path(config.root_image_dir or ".").expanduser().absolute()
        return cls(str(root), not one_machine if inline is None else inline, one_machine)
