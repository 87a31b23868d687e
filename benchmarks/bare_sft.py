"""A step of supervised fine-tuning as anybody would write it in plain PyTorch: the peer of the pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import ray

from raytune_rl.protocol.rows import RowPointer


class BareSFT:
    """Transformers and torch.optim, no DeepSpeed, no metrics, one process, one padded batch a step.

    Args:
        path: Directory of the model.
        learning_rate: Of AdamW.
    """

    def __init__(self, path: str, learning_rate: float) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate)

    def step(self, pointers: Sequence[RowPointer]) -> tuple[float, float]:
        """Forward, backward, clipping and AdamW on all rows; reading them is not counted.

        Returns:
            Seconds, and the loss.
        """
        import torch

        columns = {p.ref: ray.get(p.ref) for p in pointers}
        tokens = [columns[p.ref]["tokens"][p.row] for p in pointers]
        masks = [columns[p.ref]["loss_mask"][p.row] for p in pointers]
        started = time.perf_counter()
        width = max(len(row) for row in tokens)
        ids = torch.zeros(len(tokens), width, dtype=torch.int64)
        attention, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for line, (row, mask) in enumerate(zip(tokens, masks, strict=True)):
            size = len(row)
            ids[line, :size] = torch.from_numpy(row.astype(np.int64))
            attention[line, :size] = 1
            labels[line, :size] = torch.where(torch.from_numpy(mask.copy()), ids[line, :size], -100)
        loss = self._model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started, float(loss)
