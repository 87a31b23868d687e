"""Divergences of whole distributions against their definitions in float64, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from raytune_rl.models.distribution import (
    TeacherDistribution,
    divergence,
    token_divergence,
    top_logprobs,
    with_rest,
)
from raytune_rl.models.logprobs import logit_shape

VOCABULARY, TOKENS, WIDTH = 29, 11, 6
PLAIN = logit_shape(1.0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q), of probabilities."""
    return (p * (p / q).log()).sum(-1)


def by_definition(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Agarwal et al. 2024, equation 4, of probabilities; the limits where beta is 0 or 1."""
    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.fixture
def models() -> tuple[Tensor, nn.Linear, nn.Linear]:
    """States, and the heads of a student and of a teacher, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    heads = [nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64) for _ in range(2)]
    for head in heads:
        nn.init.normal_(head.weight, generator=generator)
    return hidden, heads[0], heads[1]


class Double(nn.Module):
    """A head whose logits stay in float64 where the code makes float32 of them."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, states: Tensor) -> Tensor:
        return (states @ self.weight.T).as_subclass(_Kept)


class _Kept(Tensor):
    def float(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("chunk", [3, 64])
def test_over_the_whole_vocabulary_it_is_the_papers_divergence(
    models: tuple[Tensor, nn.Linear, nn.Linear], beta: float, chunk: int
) -> None:
    hidden, student, teacher = models
    ids, known = top_logprobs(hidden, Double(teacher), PLAIN, VOCABULARY, chunk)
    hidden.requires_grad_()
    against = TeacherDistribution(ids, known, beta)
    mine = token_divergence(hidden, Double(student), PLAIN, against, chunk)
    weights = torch.arange(1.0, TOKENS + 1, dtype=torch.float64)
    ours = torch.autograd.grad((weights * mine).sum(), [hidden, student.weight])

    wanted = by_definition(student(hidden).softmax(-1), teacher(hidden.detach()).softmax(-1).detach(), beta)
    theirs = torch.autograd.grad((weights * wanted).sum(), [hidden, student.weight])
    assert torch.allclose(mine, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_is_left_of_the_vocabulary_is_one_outcome(
    models: tuple[Tensor, nn.Linear, nn.Linear], beta: float
) -> None:
    hidden, student, teacher = models
    ids, known = top_logprobs(hidden, Double(teacher), PLAIN, 5, 64)
    s, t = student(hidden).softmax(-1), teacher(hidden).softmax(-1)
    assert torch.equal(ids, t.topk(5, dim=-1).indices)
    mine = token_divergence(hidden, Double(student), PLAIN, TeacherDistribution(ids, known, beta), 64)

    def coarse(p: Tensor) -> Tensor:
        few = p.gather(-1, ids)
        return torch.cat([few, 1 - few.sum(-1, keepdim=True)], -1)

    assert torch.allclose(mine, by_definition(coarse(s), coarse(t), beta), rtol=1e-9, atol=1e-12)
    assert (mine <= by_definition(s, t, beta) + 1e-12).all(), "a lower bound"


def test_of_the_teacher_itself_there_is_none(models: tuple[Tensor, nn.Linear, nn.Linear]) -> None:
    hidden, _, teacher = models
    hidden.requires_grad_()
    for k in (4, VOCABULARY):
        ids, known = top_logprobs(hidden, Double(teacher), PLAIN, k, 64)
        for beta in (0.0, 0.3, 1.0):
            mine = token_divergence(hidden, Double(teacher), PLAIN, TeacherDistribution(ids, known, beta), 64)
            (slope,) = torch.autograd.grad(mine.sum(), [hidden])
            assert mine.abs().max() < 1e-12
            assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("temperature", [0.7, 1.7])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_temperature_and_disallowed_tokens_hold_for_both(
    models: tuple[Tensor, nn.Linear, nn.Linear], beta: float, temperature: float
) -> None:
    hidden, student, teacher = models
    shape = logit_shape(temperature, disallowed_token_ids=(2, 3))
    ids, known = top_logprobs(hidden, Double(teacher), shape, VOCABULARY - 2, 64)
    assert not torch.isin(ids, torch.tensor([2, 3])).any()
    mine = token_divergence(hidden, Double(student), shape, TeacherDistribution(ids, known, beta), 64)
    kept = [i for i in range(VOCABULARY) if i not in (2, 3)]
    s, t = ((head(hidden)[:, kept] / temperature).softmax(-1) for head in (student, teacher))
    assert torch.allclose(mine, by_definition(s, t, beta), rtol=1e-8, atol=1e-10)


def test_no_token_is_still_connected_to_the_graph(models: tuple[Tensor, nn.Linear, nn.Linear]) -> None:
    hidden, student, _ = models
    none = TeacherDistribution(torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1), 0.5)
    mine = token_divergence(hidden[:0], student, PLAIN, none, 64)
    (slope,) = torch.autograd.grad(mine.sum(), [student.weight])
    assert mine.shape == (0,)
    assert (slope == 0).all()


def test_next_to_no_rest_is_no_trouble() -> None:
    teacher = torch.tensor([[0.0, -40.0]])
    student = torch.tensor([[0.3, -1.0, -2.0]]).log_softmax(-1)
    s, t = with_rest(student, torch.tensor([[0, 1]]), teacher)
    for beta in (0.0, 0.5, 1.0):
        assert torch.isfinite(divergence(s, t, beta)).all()
