"""Settings of the list of algorithms."""

from __future__ import annotations

from typing import ClassVar, Literal

from raytune_rl.config.base import Options, setting


class AlgorithmsConfig(Options):
    """`raytune-rl algorithms`: every loss and every credit, with its paper and its flags."""

    COMMAND: ClassVar[str] = "algorithms"

    format: Literal["text", "markdown"] = setting(
        "Output and checkpoints", "text", "How to write it: text, or the Markdown table of the README."
    )
