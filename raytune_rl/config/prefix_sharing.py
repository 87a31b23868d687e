"""Whether what rows have in common at their beginning is computed once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from raytune_rl.config.base import Options, setting


class PrefixSharingOptions(Options):
    """For commands whose rows begin alike: completions of one prompt, sides of a pair."""

    prefix_sharing: Literal["auto", "true", "false"] = setting(
        "Length and batch",
        "auto",
        "Compute a prompt once for all rows of a micro-batch that begin with it, instead of once a row: it "
        "changes speed and memory, never the gradient. auto: in each step where it takes less time, and not "
        "with a model that cannot; true: always, and a model that cannot is an error; false: never.",
    )

    @field_validator("prefix_sharing", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """YAML reads `true` as a truth value."""
        return str(value).lower() if isinstance(value, (bool, str)) else value
