"""How token losses add up: one weight per row, computed once for the whole optimizer step.

The loss of a step is `sum_rows weight[row] * sum_t token_loss[row, t]`. The driver knows every length of the
step, so the weights already hold the normaliser over all micro-batches, ranks and accumulation. Nothing
downstream divides again, and the sum is the same however the rows are cut, ordered, padded or packed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytune_rl.errors import ConfigError

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "sft")


def row_weights(
    lengths: ArrayLike, loss_type: str, max_completion_length: int | None = None
) -> NDArray[np.float64]:
    """Weight of each row's summed token loss.

    * grpo (DeepSeekMath, eq. 3): mean over rows of the mean over tokens, `1 / (n_rows * len)`.
    * dr_grpo (Liu et al. 2025): `1 / (n_rows * max_completion_length)`, no length bias.
    * dapo (Yu et al. 2025), sft: mean over all tokens of the step, `1 / total_tokens`.
    * bnpo: ms-swift and TRL take the token mean of each *local micro-batch*. That mean changes with the
      micro-batch size and the number of ranks, so it has no meaning of its own; here the "batch" is the whole
      optimizer step, which makes it equal to dapo. With one micro-batch a step on one rank it is theirs
      exactly.

    Args:
        lengths: int [n_rows], loss tokens per row over the whole optimizer step. A row without loss tokens
            gets weight 0 and still counts in `n_rows`, as it does in TRL and ms-swift: it was sampled and
            scored.
        loss_type: one of `LOSS_TYPES`.
        max_completion_length: tokens; needed by dr_grpo only.

    Returns:
        float64 [n_rows].

    Raises:
        ConfigError: `loss_type` is unknown, or dr_grpo lacks `max_completion_length`.
    """
    length = np.asarray(lengths, dtype=np.int64)
    used = length > 0
    safe = np.maximum(length, 1).astype(np.float64)
    if loss_type == "grpo":
        weight = 1.0 / (max(len(length), 1) * safe)
    elif loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ConfigError("loss_type 'dr_grpo' divides by max_completion_length: set it to 1 or more")
        weight = np.full(len(length), 1.0 / (max(len(length), 1) * max_completion_length))
    elif loss_type in ("dapo", "bnpo", "sft"):
        weight = np.full(len(length), 1.0 / max(int(length.sum()), 1))
    else:
        raise ConfigError(f"loss_type '{loss_type}' is not known; choose one of {', '.join(LOSS_TYPES)}")
    return np.where(used, weight, 0.0)
