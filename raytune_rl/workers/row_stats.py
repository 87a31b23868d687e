"""Numbers of rows that need several columns and no model: the columns stay in the object store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.rows import RowBatch
from raytune_rl.protocol.train import TokenOrder
from raytune_rl.workers.scoring import read_rows


def row_kl(batch: RowBatch, estimator: str, timeout_s: float) -> NDArray[np.float64]:
    """The KL to the reference of each row, summed over its tokens, float64 `[n]`, nats.

    Args:
        batch: Rows with the extra columns "old_logprobs" and "ref_logprobs".
        estimator: Name of a function of `algorithms.kl`.
        timeout_s: Deadline for reading.
    """
    import torch

    from raytune_rl.algorithms import kl

    estimate = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[estimator]
    rows = read_rows(batch, timeout_s)
    sums = np.zeros(len(batch))
    for row in range(len(batch)):
        old, ref = (
            torch.from_numpy(np.array(rows.column("logprobs", row, extra=name))).double()
            for name in ("old_logprobs", "ref_logprobs")
        )
        sums[row] = float(estimate(old, ref).sum())
    return sums


def count_entropies(batch: RowBatch, bucket: int | None, timeout_s: float) -> NDArray[np.int64]:
    """How many of the rows' entropies fall into each of 65,536 buckets (`algorithms.entropy`), int64.

    Args:
        batch: Rows with the extra column "entropy".
        bucket: None counts all of them coarsely; else the fine counts within this bucket.
        timeout_s: Deadline for reading.
    """
    from raytune_rl.algorithms.entropy import count_high, count_low

    rows = read_rows(batch, timeout_s)
    entropies = [rows.column("entropy", row, extra="entropy") for row in range(len(batch))]
    values = np.concatenate([*entropies, np.empty(0, np.float32)])
    return count_high(values) if bucket is None else count_low(values, bucket)


def _token_keys(batch: RowBatch, order: TokenOrder, timeout_s: float) -> list[NDArray[np.float32]]:
    from raytune_rl.algorithms.covariance import token_keys

    rows = read_rows(batch, timeout_s)
    return [
        token_keys(
            rows.column("logprobs", row, extra="start_logprobs"),
            float(batch.scalars["advantage"][row]),
            int(batch.scalars["row_number"][row]),
            order,
        )
        for row in range(len(batch))
    ]


def count_tokens(
    batch: RowBatch, order: TokenOrder, bucket: int | None, timeout_s: float
) -> NDArray[np.int64]:
    """How many of the rows' tokens fall into each of 65,536 buckets of an order, int64.

    Args:
        batch: Rows with the extra column "start_logprobs" and the scalars "advantage" and "row_number".
        order: Of the tokens.
        bucket, timeout_s: As in `count_entropies`.
    """
    from raytune_rl.algorithms.entropy import count_high, count_low

    values = np.concatenate([*_token_keys(batch, order, timeout_s), np.empty(0, np.float32)])
    return count_high(values) if bucket is None else count_low(values, bucket)


def select_tokens(batch: RowBatch, order: TokenOrder, last: float, timeout_s: float) -> tuple[int, Columns]:
    """Which tokens come up to and with the key `last`, infinite ones never.

    Returns:
        How many, and {"selected": Ragged float32} of 1 and 0 with the rows in the batch's order.
    """
    chosen = [
        (np.isfinite(keys) & (keys <= np.float32(last))).astype(np.float32)
        for keys in _token_keys(batch, order, timeout_s)
    ]
    return int(sum(row.sum() for row in chosen)), {"selected": Ragged.from_rows(chosen, np.float32)}


def token_baseline(batch: RowBatch, timeout_s: float) -> tuple[NDArray[np.float64], Columns]:
    """Advantages against the optimal token baseline.

    Args:
        batch: Whole groups: rows with the extra column "squares", whose objects hold "logprobs" too, and the
            scalars "reward" and "group".
        timeout_s: Deadline for reading.

    Returns:
        The mean of each row, float64 `[n]`, and {"advantages": Ragged float32} in the batch's order.
    """
    from raytune_rl.algorithms.credit.otb import otb_advantages

    rows = read_rows(batch, timeout_s)
    found: dict[int, NDArray[np.float32]] = {}
    for group in np.unique(batch.scalars["group"]) if len(batch) else ():
        members = np.flatnonzero(batch.scalars["group"] == group).tolist()
        scored = (
            [rows.column(name, row, extra="squares") for row in members] for name in ("logprobs", "squares")
        )
        found |= dict(zip(members, otb_advantages(batch.scalars["reward"][members], *scored), strict=True))
    ordered = [found[row] for row in range(len(batch))]
    means = np.array([row.mean() if len(row) else 0.0 for row in ordered], dtype=np.float64)
    return means, {"advantages": Ragged.from_rows(ordered, np.float32)}
