"""Corrections of the gap between the engine that samples and the policy that trains."""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "RL algorithm")


class CorrectionOptions(Options):
    """Rollout corrections. The gap itself is measured on every step (`rollout_correction/*`)."""

    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"] | None
    ) = _setting(
        None,
        "Weigh tokens by the ratio of the policy to the engine that sampled them, of each token or of the "
        "whole completion; over the threshold a ratio is cut to it (truncate) or the token left out (mask). "
        "none: no weighing. Not set: token_truncate with --async_generate, where completions may be of older "
        "weights, else none.",
    )
    rollout_importance_sampling_threshold: float = _setting(2.0, "Upper bound of that ratio.", gt=0)
    rollout_importance_sampling_min: float | None = _setting(
        None, "Lower bound of that ratio; with token_mask this is IcePop. Not set: none.", ge=0
    )
    off_policy_sequence_mask_delta: float | None = _setting(
        None,
        "Leave out completions with a negative advantage whose tokens have lost more than this many nats on "
        "average since they were sampled. Not set: leave none out.",
        gt=0,
    )

    @model_validator(mode="after")
    def _check_corrections(self) -> Self:
        low, high = self.rollout_importance_sampling_min, self.rollout_importance_sampling_threshold
        if low is not None and low >= high:
            raise ConfigError(
                f"--rollout_importance_sampling_min {low} must be below "
                f"--rollout_importance_sampling_threshold {high}."
            )
        return self
