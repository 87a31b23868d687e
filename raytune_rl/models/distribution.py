"""Whole distributions over the vocabulary, a chunk of tokens at a time: a teacher's likeliest tokens, and how
far a student is from them.

The divergence is the generalised Jensen-Shannon divergence of Agarwal et al. 2024 (On-policy distillation of
language models, equation 4), with the teacher T, the student S and M = beta T + (1 - beta) S:

    JSD_beta = beta KL(T || M) + (1 - beta) KL(S || M)

and its limits (divided by beta, or 1 - beta) KL(T || S) at beta 0 and KL(S || T) at beta 1.

Of the teacher its k likeliest tokens are kept; the others are one more outcome, whose probability is what is
left. That is a lower bound of the divergence over all tokens (data processing inequality), exact at k =
vocabulary. ms-swift and TRL normalise both sides over the k tokens instead, which cannot see how much the
student puts elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytune_rl.models.logprobs import LogitShape


class TeacherDistribution(NamedTuple):
    """A teacher's distributions at N tokens, and how the student's are compared with them.

    Attributes:
        ids: int64 [N, k], its likeliest tokens, each once.
        logprobs: float32 [N, k], its log-probs of them.
        beta: From 0 to 1; see the file.
    """

    ids: Tensor
    logprobs: Tensor
    beta: float


def top_logprobs(
    hidden: Tensor, head: nn.Module, shape: LogitShape, k: int, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each of N distributions.

    Args:
        hidden: [N, H] in the head's dtype.
        head: Maps [n, H] to logits [n, V].
        shape: What becomes of the logits before the softmax.
        k: At most V are given.
        chunk_tokens: Most tokens that pass through the head at a time.

    Returns:
        Their ids, int64 [N, k'], and log-probs over the whole vocabulary, float32 [N, k'], the likeliest
        first; k' = min(k, V).
    """
    ids, logprobs = [], []
    with torch.no_grad():
        for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
            logits = shape.apply(head(hidden[start : start + chunk_tokens]).float())
            top, index = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
            ids.append(index)
            logprobs.append(top)
    return torch.cat(ids), torch.cat(logprobs)


def token_divergence(
    hidden: Tensor,
    head: nn.Module,
    shape: LogitShape,
    teacher: TeacherDistribution,
    chunk_tokens: int,
) -> Tensor:
    """The divergence of N tokens' distributions, nats, float32 [N], with gradient for `hidden` and `head`.

    Args:
        hidden: [N, H] in the head's dtype; N may be 0 (the result is then still connected to the graph).
        head: Maps [n, H] to logits [n, V].
        shape: What becomes of the logits before the softmax.
        teacher: What they are compared with.
        chunk_tokens: Most tokens that pass through the head at a time.
    """

    def part(states: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        student = shape.apply(head(states).float()).log_softmax(-1)
        return divergence(*with_rest(student, tokens, known), teacher.beta)

    parts = []
    for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        given = hidden[chunk], teacher.ids[chunk], teacher.logprobs[chunk]
        if torch.is_grad_enabled():
            parts.append(checkpoint(part, *given, use_reentrant=False))
        else:
            parts.append(part(*given))
    return torch.cat(parts)


def with_rest(student: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both distributions over the teacher's tokens and "any other", as log-probs.

    Args:
        student: [N, V] log-probs.
        ids: int64 [N, k].
        teacher: [N, k] log-probs.

    Returns:
        Student and teacher, [N, k + 1] each; [N, k] where there is no other token.
    """
    own = student.gather(-1, ids)
    if ids.shape[-1] == student.shape[-1]:
        return own, teacher
    others = student.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    # What is left of 1. Rounding may leave nothing, or less: then next to nothing.
    left = torch.log1p(-teacher.double().exp().sum(-1, keepdim=True).clamp(max=1 - 1e-12)).to(teacher.dtype)
    # Where the student has nothing either (tokens that are not allowed), both have the same next to nothing.
    others = torch.where(left < NOTHING, others.clamp(min=NOTHING), others)
    return torch.cat([own, others], -1), torch.cat([teacher, left], -1)


NOTHING = -27.0
"""The log-prob, nats, under which a teacher's rest is rounding."""


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """JSD_beta of distributions given as log-probs [N, outcomes], nats, [N]; see the file."""
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    weights = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second). What has no probability in the first does not count, whatever the second has."""
    difference = torch.where(first == float("-inf"), 0.0, first - second)
    return (first.exp() * difference).sum(-1)
