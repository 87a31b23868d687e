"""How losses add up: weights per row, computed once for the whole optimizer step.

The loss of a step is `sum_rows weight[row] * sum_t token_loss[row, t]`, and for losses of whole rows
`sum_rows row_weight[row] * row_loss[row]`. The driver knows every length of the
step, so the weights already hold the normaliser over all micro-batches, ranks and accumulation. Nothing
downstream divides again, and the sum is the same however the rows are cut, ordered, padded or packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_rl.algorithms.lazy import np
from raytune_rl.algorithms.registry import get_loss, loss_names
from raytune_rl.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NORMALISERS = ("rows", "tokens", "constant", "sums")


def normaliser_of(name: str) -> str:
    """One of `NORMALISERS`: the name itself, or how the loss of that name adds up.

    Raises:
        ConfigError: it is neither.
    """
    if name in NORMALISERS:
        return name
    if name in loss_names() and (held := get_loss(name).normaliser) != name:
        return normaliser_of(held)
    raise ConfigError(
        f"'{name}' is no way in which losses add up; it must be one of {', '.join(NORMALISERS)}, or the name "
        f"of a loss: {', '.join(loss_names())}"
    )


def row_weights(
    lengths: ArrayLike, normaliser: str, max_completion_length: int | None = None
) -> NDArray[np.float64]:
    """Weight of each row's summed token loss.

    * rows (DeepSeekMath, eq. 3): mean over rows of the mean over tokens, `1 / (n_rows * len)`.
    * constant (Liu et al. 2025, Dr. GRPO): `1 / (n_rows * max_completion_length)`, no length bias.
    * tokens (Yu et al. 2025, DAPO; SFT): mean over all tokens of the step, `1 / total_tokens`.
    * sums (Liu et al. 2026, LUSPO): mean over rows of the sum over tokens, `1 / n_rows`.

    Args:
        lengths: int [n_rows], loss tokens per row over the whole optimizer step. A row without loss tokens
            gets weight 0 and still counts in `n_rows`, as it does in TRL and ms-swift: it was sampled and
            scored.
        normaliser: one of the above, or the name of a loss (`normaliser_of`).
        max_completion_length: tokens; needed by "constant" only.

    Returns:
        float64 [n_rows].

    Raises:
        ConfigError: `normaliser` is unknown, or "constant" lacks `max_completion_length`.
    """
    way = normaliser_of(normaliser)
    length = np.asarray(lengths, dtype=np.int64)
    used = length > 0
    safe = np.maximum(length, 1).astype(np.float64)
    if way == "rows":
        weight = 1.0 / (max(len(length), 1) * safe)
    elif way == "tokens":
        weight = np.full(len(length), 1.0 / max(int(length.sum()), 1))
    elif way == "sums":
        weight = np.full(len(length), 1.0 / max(len(length), 1))
    else:
        if max_completion_length is None or max_completion_length < 1:
            raise ConfigError(f"'{normaliser}' divides by max_completion_length: set it to 1 or more")
        weight = np.full(len(length), 1.0 / (max(len(length), 1) * max_completion_length))
    return np.where(used, weight, 0.0)


def lengths_in_loss(lengths: ArrayLike, truncated: ArrayLike, overlong_filter: bool) -> NDArray[np.int64]:
    """Loss tokens per row after the overlong filter (DAPO, section 3.4): what was cut off teaches nothing.

    Whether such a completion would have been right is unknown. Given to `row_weights`, a filtered row has
    weight 0; it adds no tokens to the normaliser, and it still counts as a row, as in TRL and ms-swift. Its
    reward has already counted in its group.

    Args:
        lengths: int [n_rows], tokens.
        truncated: bool [n_rows], the completion ran into the length limit.
        overlong_filter: whether to filter at all.
    """
    length = np.asarray(lengths, dtype=np.int64)
    return np.where(np.asarray(truncated, dtype=bool), 0, length) if overlong_filter else length


@dataclass(frozen=True)
class PreferenceWeights:
    """Weights of one optimizer step on preference data.

    Attributes:
        weight: float64 [n_rows], of the summed token losses: the likelihood term on desired completions.
        row_weight: float64 [n_rows], of the row losses.
    """

    weight: NDArray[np.float64]
    row_weight: NDArray[np.float64]


def pair_weights(lengths: ArrayLike, likelihood: Literal["tokens", "rows"] = "tokens") -> PreferenceWeights:
    """Weights for pairs whose chosen side is row 2k and whose rejected side is row 2k + 1.

    The pairs' losses are averaged over the pairs of the step. The likelihood term (DPO's rpo_alpha and sft,
    ORPO, CPO) is averaged over all chosen tokens of the step ("tokens": TRL and ms-swift do so for each
    micro-batch), or over pairs of their mean over tokens ("rows": as the ORPO paper has it).

    Args:
        lengths: int [2 * n_pairs], loss tokens.
        likelihood: how the likelihood term is averaged.

    Raises:
        ValueError: an odd number of rows.
    """
    length = np.asarray(lengths, dtype=np.int64)
    if len(length) % 2:
        raise ValueError(f"{len(length)} rows are not pairs")
    weight = np.zeros(len(length))
    if len(length):
        weight[0::2] = row_weights(length[0::2], likelihood)
    return PreferenceWeights(weight, np.full(len(length), 2.0 / max(len(length), 1)))


def single_weights(lengths: ArrayLike) -> PreferenceWeights:
    """Weights for rows that stand alone (KTO): the mean over rows, and no likelihood term."""
    count = len(np.asarray(lengths))
    return PreferenceWeights(np.zeros(count), np.full(count, 1.0 / max(count, 1)))
