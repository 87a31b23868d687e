"""Log-probs of a micro-batch by our scorer."""

from __future__ import annotations

from typing import Any

import torch

from raytune_rl.data.collate import MicroBatch
from raytune_rl.models.scorer import TokenScorer


def score(model: Any, micro: MicroBatch) -> torch.Tensor:
    """float32 [N], with gradient."""
    return TokenScorer(model)(
        micro.input_ids,
        micro.position_ids,
        micro.attention_mask,
        micro.predict_index,
        micro.targets,
        **micro.model_inputs,
    ).logprobs
