"""Log-probs of given tokens from hidden states, without ever holding [tokens, vocab] for a whole batch.

At 8,000 tokens and a vocabulary of 150,000, one float32 copy of the logits takes 4.8 GB and a plain
log-softmax with its gradient holds several. Here tokens pass through the head in chunks, forward and
backward, and at most a few [chunk, vocab] buffers exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from raytune_rl.errors import ConfigError

# 2^26 float32 logits are 256 MB: large enough to keep a matrix unit busy, small beside any model worth a GPU.
CHUNK_LOGITS = 2**26
# Low enough that its probability is 0 beside any logit, and finite: 0 * -inf would be NaN in entropies.
_DISALLOWED_LOGIT = -1e9


class TokenLogprobs(NamedTuple):
    """Results for M tokens.

    Attributes:
        logprobs: float32 [M], log softmax(logits / temperature) at the target, with gradient.
        entropy: float32 [M] in nats of that distribution, with gradient, or None when it was not asked for.
        correct: bool [M], no logit is larger than the target's.
        divergence: float32 [M] in nats, to a teacher's distribution, with gradient, or None when there is
            none (`distribution.token_divergence`).
        top: ids, int64 [M, k], and log-probs, float32 [M, k], of the likeliest tokens, or None when they were
            not asked for.
        squares: float32 [M], sum of the squared probabilities of the vocabulary, without gradient; None when
            it was not asked for.
        router_probabilities, router_counts: of a mixture's experts, see `routing.router_sums`; None when they
            were not asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None
    correct: Tensor
    divergence: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    squares: Tensor | None = None
    router_probabilities: Tensor | None = None
    router_counts: Tensor | None = None


def default_chunk_tokens(vocab_size: int) -> int:
    """Tokens per chunk that keep one [chunk, vocab] buffer near 256 MB."""
    return max(64, CHUNK_LOGITS // max(vocab_size, 1))


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
    softcap: float | None = None,
    logit_scale: float | None = None,
    disallowed_token_ids: tuple[int, ...] = (),
) -> TokenLogprobs:
    """Scores M target tokens, chunk by chunk.

    logits = softcap * tanh(logit_scale * head(hidden) / softcap), then log softmax(logits / temperature). The
    head runs in the model's dtype, the softmax in float32.

    A plain `nn.Linear` head takes a hand-written backward (one gradient buffer for the weight, softmax
    gradient in place; the logits are kept when everything fits into one chunk and recomputed otherwise). Any
    other head (LoRA on it, `modules_to_save`, hooks, autocast) is called as a module under activation
    checkpointing. Both give the same numbers.

    Args:
        hidden: [M, H] in the head's dtype; M may be 0 (the result is then still connected to the graph).
        head: maps [m, H] to logits [m, V].
        targets: int64 [M].
        temperature: above 0; the one that the tokens were sampled with.
        chunk_tokens: most tokens that pass through the head at a time.
        with_entropy: also compute the entropy (one more buffer and pass per chunk).
        softcap: `final_logit_softcapping` of the Gemma family.
        logit_scale: factor on the head's output (Cohere, Granite).
        disallowed_token_ids: tokens that sampling never gives; the distribution is over the others.

    Raises:
        ConfigError: `temperature` or `chunk_tokens` is not positive.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    shape = logit_shape(temperature, softcap, logit_scale, disallowed_token_ids)
    if _is_plain_linear(head) and not torch.is_autocast_enabled(hidden.device.type):
        logprobs, entropy, correct = _LinearHead.apply(
            hidden, head.weight, head.bias, targets, shape, chunk_tokens, with_entropy
        )
        return TokenLogprobs(logprobs, entropy if with_entropy else None, correct)
    return _checkpointed(hidden, head, targets, shape, chunk_tokens, with_entropy)


def logit_shape(
    temperature: float,
    softcap: float | None = None,
    logit_scale: float | None = None,
    disallowed_token_ids: tuple[int, ...] = (),
) -> LogitShape:
    """What becomes of a head's output before the softmax; arguments as in `token_logprobs`.

    Raises:
        ConfigError: `temperature` is not positive.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; log-probs need a temperature above 0")
    scale = 1.0 if logit_scale is None else logit_scale
    return LogitShape(1.0 / temperature, softcap, scale, disallowed_token_ids)


@torch.no_grad()
def squared_probabilities(
    hidden: Tensor, head: nn.Module, shape: LogitShape, chunk_tokens: int = 1024
) -> Tensor:
    """The probability that two draws of the next token are the same, sum over the vocabulary of pi^2.

    Args:
        hidden, head, chunk_tokens: As in `token_logprobs`.
        shape: Of the logits (`logit_shape`).

    Returns:
        float32 [M], without gradient.
    """
    parts = []
    for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
        log_p = shape.apply(head(hidden[start : start + chunk_tokens]).float()).log_softmax(-1)
        parts.append((2.0 * log_p).exp().sum(-1))
    return torch.cat(parts)


def _is_plain_linear(head: nn.Module) -> bool:
    """True if calling `head` does nothing but one matrix product with a weight that is wholly here (not
    ZeRO-3)."""
    if type(head) is not nn.Linear or hasattr(head.weight, "ds_id"):
        return False
    return not (
        head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    )


@dataclass(frozen=True)
class LogitShape:
    """The change of the head's output before the softmax, in place, and its derivative."""

    inverse_temperature: float
    softcap: float | None
    scale: float
    disallowed_token_ids: tuple[int, ...] = ()

    def apply_(self, raw: Tensor) -> Tensor:
        if self.softcap is not None:
            raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap * self.inverse_temperature)
        elif self.scale * self.inverse_temperature != 1.0:
            raw.mul_(self.scale * self.inverse_temperature)
        return raw.index_fill_(-1, self._ids(raw), _DISALLOWED_LOGIT) if self.disallowed_token_ids else raw

    def apply(self, raw: Tensor) -> Tensor:
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw * (self.scale / self.softcap)) * self.inverse_temperature
        else:
            raw = raw * (self.scale * self.inverse_temperature)
        return raw.index_fill(-1, self._ids(raw), _DISALLOWED_LOGIT) if self.disallowed_token_ids else raw

    def _ids(self, raw: Tensor) -> Tensor:
        return torch.tensor(self.disallowed_token_ids, device=raw.device)

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the raw output, from the one with respect to the final logits."""
        factor = self.scale * self.inverse_temperature
        if self.softcap is not None:
            squashed = logits / (self.softcap * self.inverse_temperature)
            grad.mul_(squashed.square_().neg_().add_(1.0))
        return grad if factor == 1.0 else grad.mul_(factor)


class _Logits:
    """Final logits of one chunk after another in the same memory: on a CPU, fresh pages cost as much as the
    product."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: LogitShape, chunk_tokens: int
    ) -> None:
        self.hidden, self.weight, self.bias, self.shape = hidden, weight, bias, shape
        rows = min(hidden.shape[0], chunk_tokens)
        self.raw = hidden.new_empty(rows, weight.shape[0])
        is_float = hidden.dtype == torch.float32
        self.out = self.raw if is_float else torch.empty_like(self.raw, dtype=torch.float32)

    def fill(self, part: slice) -> Tensor:
        """float32 [rows of `part`, V]; overwritten by the next call."""
        states = self.hidden[part]
        raw, out = self.raw[: len(states)], self.out[: len(states)]
        if self.bias is None:
            torch.mm(states, self.weight.t(), out=raw)
        else:
            torch.addmm(self.bias, states, self.weight.t(), out=raw)
        if self.out is not self.raw:
            out.copy_(raw)
        return self.shape.apply_(out)


class _LinearHead(torch.autograd.Function):
    """Chunked log-probs through a linear head. d logp[t] / d logits[j] = 1{j=t} - p[j]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        log_z = torch.empty_like(logprobs)
        correct = torch.empty(count, dtype=torch.bool, device=hidden.device)
        keep = count <= chunk_tokens and any(ctx.needs_input_grad)
        kept: Tensor | None = None
        buffer = _Logits(hidden, weight, bias, shape, chunk_tokens)
        for start in range(0, count, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = buffer.fill(part)
            top = logits.amax(dim=-1)
            at_target = logits.gather(-1, targets[part, None]).squeeze(-1)
            shifted = logits - top[:, None] if keep else logits.sub_(top[:, None])
            if with_entropy:
                # H = log Z - E[logit], with logits taken relative to the largest one.
                weights = shifted.exp()
                total = weights.sum(-1)
                expected = weights.mul_(shifted).sum(-1) / total
                entropy[part] = total.log() - expected
            else:
                total = shifted.exp_().sum(-1)
            log_z[part] = top + total.log()
            logprobs[part] = at_target - log_z[part]
            correct[part] = at_target == top
            kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, entropy, kept)
        ctx.shape, ctx.chunk_tokens, ctx.with_entropy = shape, chunk_tokens, with_entropy
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple:
        hidden, weight, bias, targets, log_z, entropy, kept = ctx.saved_tensors
        shape: LogitShape = ctx.shape
        grad_entropy = grad_entropy if ctx.with_entropy else None
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        buffer = None if kept is not None else _Logits(hidden, weight, bias, shape, ctx.chunk_tokens)
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = kept if buffer is None else buffer.fill(part)
            # In place where nobody needs the logits again: not the kept ones, a second backward may come.
            reuse = buffer is not None and shape.softcap is None
            log_p = logits.sub_(log_z[part, None]) if reuse else logits - log_z[part, None]
            grad = log_p.exp() if grad_entropy is not None else log_p.exp_()
            if grad_entropy is not None:
                # d H / d logits[j] = -p[j] (log p[j] + H)
                rate = log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None])
                if grad_logprobs is not None:
                    rate.add_(grad_logprobs[part, None])
                grad.mul_(rate).neg_()
            elif grad_logprobs is not None:
                grad.mul_(-grad_logprobs[part, None])
            else:
                grad.zero_()
            if grad_logprobs is not None:
                grad.scatter_add_(-1, targets[part, None], grad_logprobs[part, None])
            shape.backward_(grad, logits)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[part])
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0))
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _checkpointed(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    shape: LogitShape,
    chunk_tokens: int,
    with_entropy: bool,
) -> TokenLogprobs:
    def score(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = shape.apply(head(states).float())
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, wanted[:, None]).squeeze(-1) - log_z
        entropy = logprobs.new_empty(0)
        if with_entropy:
            log_p = logits - log_z[:, None]
            entropy = -(log_p.exp() * log_p).sum(-1)
        with torch.no_grad():
            correct = logits.argmax(-1) == wanted
        return logprobs, entropy, correct

    parts = []
    # One empty chunk when there are no tokens: the head's parameters must still take part in the backward.
    for start in range(0, max(hidden.shape[0], 1), chunk_tokens):
        states, wanted = hidden[start : start + chunk_tokens], targets[start : start + chunk_tokens]
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, states, wanted, use_reentrant=False))
        else:
            parts.append(score(states, wanted))
    logprobs, entropy, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLogprobs(logprobs, entropy if with_entropy else None, correct)
