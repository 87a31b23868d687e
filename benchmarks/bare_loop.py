"""The training half of a GRPO step as anybody would write it in plain PyTorch: the peer of the policy
worker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import ray

from raytune_rl.protocol.rows import RowPointer


class BareLoop:
    """Transformers and torch.optim, no DeepSpeed, no metrics, one process.

    Args:
        path: Directory of the model.
        learning_rate: Of AdamW.
        temperature: Of the log-probs.
        epsilon: Clip range.
    """

    def __init__(self, path: str, learning_rate: float, temperature: float, epsilon: float) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate)
        self._temperature, self._epsilon = temperature, epsilon

    def step(
        self,
        pointers: Sequence[RowPointer],
        advantages: np.ndarray,
        weights: np.ndarray,
        parts: Sequence[Sequence[int]],
    ) -> tuple[float, float]:
        """One optimizer step on rows of the object store.

        Args:
            pointers: Where each row's tokens and loss mask lie.
            advantages: float `[n]`.
            weights: float `[n]`, of each row's summed token loss.
            parts: The rows of each micro-batch.

        Returns:
            Seconds, reading the rows not counted, and the loss.
        """
        import torch

        columns = {p.ref: ray.get(p.ref) for p in pointers}
        tokens = [columns[p.ref]["tokens"][p.row] for p in pointers]
        masks = [columns[p.ref]["loss_mask"][p.row] for p in pointers]
        total = 0.0
        started = time.perf_counter()
        for rows in parts:
            width = max(len(tokens[row]) for row in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            attention, loss_mask = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
            for line, row in enumerate(rows):
                size = len(tokens[row])
                ids[line, :size] = torch.from_numpy(tokens[row].astype(np.int64))
                attention[line, :size] = 1
                loss_mask[line, :size] = torch.from_numpy(masks[row].copy())
            wanted = loss_mask[:, 1:]
            logits = self._model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
            logits = logits[wanted] / self._temperature
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:][wanted][:, None])[:, 0]
            row_of = wanted.nonzero()[:, 0]
            advantage = torch.from_numpy(advantages[list(rows)]).float()[row_of]
            weight = torch.from_numpy(weights[list(rows)]).float()[row_of]
            ratio = (logprobs - logprobs.detach()).exp()
            clipped = ratio.clamp(1 - self._epsilon, 1 + self._epsilon)
            loss = -(weight * torch.minimum(ratio * advantage, clipped * advantage)).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started, total
