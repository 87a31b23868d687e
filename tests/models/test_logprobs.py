"""Chunked log-probs equal the plain computation and stay small."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_rl.errors import ConfigError
from raytune_rl.models.logprobs import TokenLogprobs, logit_shape, squared_probabilities, token_logprobs

HIDDEN, VOCAB, TOKENS = 16, 97, 23


class Wrapped(nn.Module):
    """A head that is not a plain nn.Linear, so that the checkpointed path is taken."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def naive(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float | None,
) -> TokenLogprobs:
    logits = head(hidden).float() * (1.0 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return TokenLogprobs(log_p[torch.arange(len(targets)), targets], entropy, logits.argmax(-1) == targets)


def case(bias: bool = False, tokens: int = TOKENS) -> tuple[Tensor, nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias)
    nn.init.normal_(head.weight, std=0.7)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCAB, (tokens,))
    if tokens > 4:  # some right answers, so that `correct` is not all False
        targets[:4] = head(hidden[:4]).argmax(-1)
    return hidden, head, targets, torch.randn(tokens), torch.randn(tokens)


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"),
    [(1.0, None, None), (0.7, None, 0.25), (1.3, 3.0, None), (0.9, 2.0, 1.7)],
)
def test_equals_naive_in_value_and_gradient(
    chunk: int, plain: bool, temperature: float, softcap: float | None, scale: float | None
) -> None:
    hidden, head, targets, w_logp, w_ent = case(bias=True)
    expected = naive(hidden, head, targets, temperature, softcap, scale)
    assert expected.entropy is not None
    leaves = [hidden, head.weight, head.bias]
    want = torch.autograd.grad((expected.logprobs * w_logp + expected.entropy * w_ent).sum(), leaves)

    module: nn.Module = head if plain else Wrapped(head)
    got = token_logprobs(hidden, module, targets, temperature, chunk, True, softcap, scale)
    assert got.entropy is not None
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-6, atol=2e-6)
    assert got.correct.tolist() == expected.correct.tolist()
    assert got.correct[:4].all()
    have = torch.autograd.grad((got.logprobs * w_logp + got.entropy * w_ent).sum(), leaves)
    for mine, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item() + 1e-6)


def test_gradient_of_logprobs_alone_and_of_entropy_alone() -> None:
    hidden, head, targets, weight, _ = case()
    expected = naive(hidden, head, targets, 1.0, None, None)
    got = token_logprobs(hidden, head, targets, 1.0, 7, True)
    for mine, theirs in ((got.logprobs, expected.logprobs), (got.entropy, expected.entropy)):
        assert mine is not None
        assert theirs is not None
        have = torch.autograd.grad((mine * weight).sum(), [hidden, head.weight], retain_graph=True)
        want = torch.autograd.grad((theirs * weight).sum(), [hidden, head.weight], retain_graph=True)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_frozen_head_passes_gradient_to_hidden_only() -> None:
    hidden, head, targets, weight, _ = case()
    want = torch.autograd.grad(
        (naive(hidden, head, targets, 1.0, None, None).logprobs * weight).sum(), hidden
    )[0]
    head.requires_grad_(False)
    got = token_logprobs(hidden, head, targets, 1.0, 6)
    (got.logprobs * weight).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_no_tokens_still_reach_every_parameter(plain: bool) -> None:
    hidden, head, targets, _, _ = case(tokens=0)
    module: nn.Module = head if plain else Wrapped(head)
    got = token_logprobs(hidden, module, targets, 1.0, 8, True)
    assert got.logprobs.shape == (0,)
    got.logprobs.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("plain", [True, False])
def test_softmax_is_float32_below_a_bfloat16_model(plain: bool) -> None:
    hidden, head, targets, weight, _ = case()
    head16, hidden16 = copy.deepcopy(head).bfloat16(), hidden.detach().bfloat16().requires_grad_()
    module: nn.Module = head16 if plain else Wrapped(head16)
    got = token_logprobs(hidden16, module, targets, 1.0, 5)
    assert got.logprobs.dtype == torch.float32
    # Exactly the float32 softmax of the bfloat16 logits, not a bfloat16 softmax.
    want = torch.log_softmax(head16(hidden16).float(), -1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(got.logprobs, want, rtol=1e-6, atol=1e-6)
    (got.logprobs * weight).sum().backward()
    assert hidden16.grad is not None
    assert hidden16.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    hidden, head, targets, _, _ = case()
    got = token_logprobs(hidden * 1e4, head, targets, 1.0, 5, True)
    assert got.entropy is not None
    (got.logprobs.sum() + got.entropy.sum()).backward()
    assert torch.isfinite(got.logprobs).all()
    assert torch.isfinite(got.entropy).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("plain", [True, False])
def test_never_holds_all_logits(plain: bool) -> None:
    tokens, vocab, chunk = 512, 4096, 32
    head = nn.Linear(8, vocab, bias=False)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    module: nn.Module = head if plain else Wrapped(head)
    with Largest() as mode:
        got = token_logprobs(hidden, module, targets, 1.0, chunk, True)
        assert got.entropy is not None
        (got.logprobs.sum() + got.entropy.sum()).backward()
    assert mode.elements == chunk * vocab  # and the probe sees what it should: the naive way makes them all
    with Largest() as mode:
        naive(hidden, head, targets, 1.0, None, None).logprobs.sum().backward()
    assert mode.elements == tokens * vocab


def test_saves_no_logits_between_forward_and_backward() -> None:
    tokens, vocab, chunk = 256, 2048, 16
    head = nn.Linear(8, vocab, bias=False)
    hidden = torch.randn(tokens, 8, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        token_logprobs(hidden, head, targets, 1.0, chunk, True)
    assert sum(n for n in saved if n != head.weight.numel()) < 4 * hidden.numel()


@pytest.mark.parametrize(("temperature", "chunk"), [(0.0, 4), (-1.0, 4), (float("nan"), 4), (1.0, 0)])
def test_refuses_impossible_settings(temperature: float, chunk: int) -> None:
    hidden, head, targets, _, _ = case()
    with pytest.raises(ConfigError):
        token_logprobs(hidden, head, targets, temperature, chunk)


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_banned_tokens_have_no_part_in_the_distribution(
    chunk: int, plain: bool, softcap: float | None
) -> None:
    """As sampled: the softmax runs over the other tokens only, in values and in gradients."""
    hidden, head, targets, w_logp, w_ent = case()
    disallowed_token_ids = (7, 30, 96)
    others = torch.tensor([token for token in range(VOCAB) if token not in disallowed_token_ids])
    targets = others[targets % len(others)]
    logits = head(hidden)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = torch.log_softmax(logits[:, others] / 0.8, -1)
    want_logp = kept.gather(-1, torch.searchsorted(others, targets)[:, None])[:, 0]
    want_ent = -(kept.exp() * kept).sum(-1)
    leaves = [hidden, head.weight]
    want = torch.autograd.grad((want_logp * w_logp + want_ent * w_ent).sum(), leaves)

    module: nn.Module = head if plain else Wrapped(head)
    got = token_logprobs(
        hidden, module, targets, 0.8, chunk, True, softcap, disallowed_token_ids=disallowed_token_ids
    )
    assert got.entropy is not None
    torch.testing.assert_close(got.logprobs, want_logp, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got.entropy, want_ent, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((got.logprobs * w_logp + got.entropy * w_ent).sum(), leaves)
    for mine, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, None), (0.7, 5.0, 0.5)])
def test_squared_probabilities(
    chunk: int, temperature: float, softcap: float | None, scale: float | None
) -> None:
    """The sum over the vocabulary of pi^2, of the distribution that the log-probs are of."""
    hidden, head, _, _, _ = case()
    got = squared_probabilities(hidden, head, logit_shape(temperature, softcap, scale, (3,)), chunk)
    logits = head(hidden).double() * (1.0 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits[:, 3] = -torch.inf
    want = (logits / temperature).softmax(-1).square().sum(-1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    assert not got.requires_grad
    assert squared_probabilities(hidden[:0], head, logit_shape(1.0)).shape == (0,)
