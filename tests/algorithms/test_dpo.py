"""Each DPO loss against its paper's formula in Python floats, with slopes by central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.algorithms import aot
from raytune_rl.algorithms.aggregation import pair_weights
from raytune_rl.algorithms.divergence import divergence_reward
from raytune_rl.algorithms.dpo_losses import PAIR_LOSSES
from raytune_rl.algorithms.losses.dpo import DPOSettings
from raytune_rl.algorithms.pairs import PAIR, pair_numbers
from raytune_rl.algorithms.registry import LossInputs, get_loss
from raytune_rl.errors import ConfigError
from tests.algorithms.step import F64, make_pairs, rows_of, step_result

# chosen, rejected, chosen, ...: longer and shorter, single tokens, an empty completion
LENGTHS = (5, 3, 1, 1, 2, 7, 4, 0)
PAIRS = len(LENGTHS) // 2
BETA, EPS = 0.3, 0.1
CUTS = [[[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 7, 0, 1], [], [4, 5, 2, 3]]]


def ls(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sig(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cdpo(z: float) -> float:
    return -(1 - EPS) * ls(z) - EPS * ls(-z)


def dkl(p: float, q: float) -> float:
    return p * math.log(p / q)


# (x, y, chosen length, rejected length) -> loss, from the papers
PAPER: dict[str, Callable[[float, float, int, int], float]] = {
    "sigmoid": lambda x, y, n, m: cdpo(BETA * (x - y)),
    "ipo": lambda x, y, n, m: (x / n - y / m - 1 / (2 * BETA)) ** 2,
    "hinge": lambda x, y, n, m: max(0.0, 1 - BETA * (x - y)),
    "robust": lambda x, y, n, m: (
        ((1 - EPS) * -ls(BETA * (x - y)) - EPS * -ls(BETA * (y - x))) / (1 - 2 * EPS)
    ),
    "exo_pair": lambda x, y, n, m: dkl(sig(BETA * (x - y)), 1 - EPS) + dkl(sig(BETA * (y - x)), EPS),
    "nca_pair": lambda x, y, n, m: -ls(BETA * x) - (ls(-BETA * x) + ls(-BETA * y)) / 2,
    "bco_pair": lambda x, y, n, m: -ls(BETA * x) - ls(-BETA * y),
    "sppo_hard": lambda x, y, n, m: (x - 0.5 / BETA) ** 2 + (y + 0.5 / BETA) ** 2,
    "apo_zero": lambda x, y, n, m: (1 - sig(BETA * x)) + sig(BETA * y),
    "apo_down": lambda x, y, n, m: sig(BETA * x) + (1 - sig(BETA * (x - y))),
    "discopop": lambda x, y, n, m: (
        -(1 - sig(BETA * (x - y) / 0.05)) * ls(BETA * (x - y))
        + sig(BETA * (x - y) / 0.05) * math.exp(-BETA * (x - y))
    ),
}
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")


def settings_for(kind: str, **more: Any) -> DPOSettings:
    given = {"label_smoothing": EPS if kind in SMOOTHED else 0.0, "bco_shift": False}
    return DPOSettings(loss_type=(kind,), beta=BETA, **{**given, **more})


def log_ratios(given: LossInputs) -> np.ndarray:
    gap = (given.logprobs - given.columns["ref_logprobs"]).detach()
    return np.array([gap[given.row_of == row].sum().item() for row in range(given.n_rows)])


def slopes(f: Callable[[float, float], float], x: float, y: float, h: float = 1e-5) -> tuple[float, float]:
    return (f(x + h, y) - f(x - h, y)) / (2 * h), (f(x, y + h) - f(x, y - h)) / (2 * h)


def expected(
    given: LossInputs, loss: Callable[[float, float, int, int], float]
) -> tuple[float, torch.Tensor]:
    """Mean over pairs, and its gradient: every token of a row has that of the row's log ratio."""
    ratio = log_ratios(given)
    total, per_row = 0.0, np.zeros(given.n_rows)
    for k in range(given.n_rows // 2):
        n, m = max(LENGTHS[2 * k], 1), max(LENGTHS[2 * k + 1], 1)
        x, y = ratio[2 * k], ratio[2 * k + 1]
        total += loss(x, y, n, m)
        per_row[2 * k : 2 * k + 2] = slopes(lambda a, b, n=n, m=m: loss(a, b, n, m), x, y)
    count = given.n_rows // 2
    return total / count, torch.from_numpy(per_row / count)[given.row_of]


def run(
    given: LossInputs, cut: list[list[int]] | None = None
) -> tuple[float, torch.Tensor, dict[str, float]]:
    weights = pair_weights(np.bincount(given.row_of, minlength=given.n_rows))
    return step_result("dpo", given, weights.weight, weights.row_weight, cut)


@pytest.mark.parametrize("kind", list(PAPER))
def test_each_loss_is_its_papers(kind: str) -> None:
    assert set(PAPER) == set(PAIR_LOSSES)
    given = make_pairs(LENGTHS, settings_for(kind), seed=8)
    loss, grad, _ = run(given)
    want, slope = expected(given, PAPER[kind])
    assert loss == pytest.approx(want, rel=1e-11)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)
    assert grad.abs().sum() > 0.01


DIVERGENCES: dict[str, Callable[[float], float]] = {
    # f' of the f-DPO paper's table, at the density ratio t
    "reverse_kl": lambda t: math.log(t) + 1,
    "forward_kl": lambda t: -1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (1 - t**-0.7) / 0.7,
}


@pytest.mark.parametrize("kind", list(DIVERGENCES))
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust", "exo_pair"])
def test_divergences(kind: str, loss_type: str) -> None:
    """f-DPO: the reward is f'(pi / pi_ref); alpha is the paper's, here 0.7."""
    more = {"f_divergence_type": kind, "f_alpha_divergence_coef": 0.7}
    given = make_pairs(LENGTHS, settings_for(loss_type, **more), seed=9)
    f, base = DIVERGENCES[kind], DIVERGENCES[kind](1.0)
    offset = base if loss_type == "ipo" else 0.0  # lengths differ, so the constant does not cancel

    def loss(x: float, y: float, n: int, m: int) -> float:
        return PAPER[loss_type](f(math.exp(x)) - offset, f(math.exp(y)) - offset, n, m)

    got, grad, _ = run(given)
    want, slope = expected(given, loss)
    assert got == pytest.approx(want, rel=1e-10)
    torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-9)


def test_divergences_at_the_reference_and_beyond() -> None:
    u = torch.tensor([0.0, 1e3, -1e3, 1e5, -1e5], dtype=F64, requires_grad=True)
    for kind in DIVERGENCES:
        g = divergence_reward(u, kind, 0.5)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(g.sum(), u)
        assert g[0].item() == pytest.approx(0.0)
        assert slope[0].item() == pytest.approx(0.5 if kind == "js_divergence" else 1.0)
        assert torch.isfinite(g).all()
        assert torch.isfinite(slope).all()
    at = torch.tensor([0.7], dtype=F64)
    for alpha, limit in ((1e-9, "reverse_kl"), (1 - 1e-9, "forward_kl")):
        near = divergence_reward(at, "alpha_divergence", alpha).item()
        assert near == pytest.approx(divergence_reward(at, limit).item(), rel=1e-6)  # type: ignore[arg-type]


def test_combination_with_weights_and_likelihood() -> None:
    """MPO: 0.8 sigmoid + 0.2 bco_pair + 1 sft, and RPO's term; sft is the mean over all chosen tokens."""
    mixed = DPOSettings(
        loss_type=("sigmoid", "bco_pair", "sft"),
        loss_weights=(0.8, 0.2, 1.0),
        beta=BETA,
        rpo_alpha=0.5,
        bco_shift=False,
    )
    given = make_pairs(LENGTHS, mixed, seed=10)
    loss, grad, metrics = run(given)
    single = {
        kind: run(
            replace(given, settings=replace(mixed, loss_type=(kind,), loss_weights=None, rpo_alpha=None))
        )
        for kind in ("sigmoid", "bco_pair")
    }
    chosen = given.row_of % 2 == 0
    nll = -given.logprobs.detach()[chosen].mean().item()
    assert loss == pytest.approx(
        0.8 * single["sigmoid"][0] + 0.2 * single["bco_pair"][0] + 1.5 * nll, rel=1e-11
    )
    slope = 0.8 * single["sigmoid"][1] + 0.2 * single["bco_pair"][1] - 1.5 * chosen.double() / chosen.sum()
    torch.testing.assert_close(grad, slope, rtol=1e-10, atol=1e-13)
    assert metrics["nll_loss"] == pytest.approx(nll)
    assert "nll_loss" not in single["sigmoid"][2]


def test_likelihood_per_row_is_orpos_mean() -> None:
    weights = pair_weights(LENGTHS, "rows")
    np.testing.assert_allclose(weights.weight, [1 / 20, 0, 1 / 4, 0, 1 / 8, 0, 1 / 16, 0])
    np.testing.assert_allclose(weights.row_weight, 1 / PAIRS)
    assert pair_weights([]).weight.shape == (0,)
    with pytest.raises(ValueError, match="3 rows"):
        pair_weights([1, 2, 3])


def test_ld_alpha_discounts_what_goes_beyond_the_shorter_side() -> None:
    """LD-DPO: log pi = sum of the common length + alpha times the rest, for policy and reference alike."""
    alpha = 0.4
    given = make_pairs(LENGTHS, settings_for("sigmoid", ld_alpha=alpha), seed=11)
    loss, grad, _ = run(given)
    gap = (given.logprobs - given.columns["ref_logprobs"]).detach()
    factor = []
    for row, length in enumerate(LENGTHS):
        common = min(length, LENGTHS[row + 1 if row % 2 == 0 else row - 1])
        factor += [1.0] * common + [alpha] * (length - common)
    scale = torch.tensor(factor, dtype=F64)
    ratio = [(scale * gap)[given.row_of == row].sum().item() for row in range(len(LENGTHS))]
    want = sum(cdpo(BETA * (ratio[2 * k] - ratio[2 * k + 1])) for k in range(PAIRS)) / PAIRS
    assert loss == pytest.approx(want, rel=1e-12)
    one = replace(given, settings=settings_for("sigmoid", ld_alpha=1.0))
    assert run(one)[0] == pytest.approx(run(replace(given, settings=settings_for("sigmoid")))[0], rel=1e-13)
    per_row = []
    for k in range(PAIRS):
        per_row += slopes(lambda x, y: cdpo(BETA * (x - y)) / PAIRS, ratio[2 * k], ratio[2 * k + 1])
    slope = torch.tensor(per_row, dtype=F64)[given.row_of] * scale
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)


def test_bco_shift() -> None:
    """BCO: rewards less delta, by default, as its authors have it."""
    assert DPOSettings(loss_type=("bco_pair",)).shifts
    assert not DPOSettings().shifts, "only where bco_pair takes part"
    shift = 0.7
    given = make_pairs(LENGTHS, settings_for("bco_pair", bco_shift=True), seed=12, bco_shift=[shift] * 8)
    loss, grad, _ = run(given)
    want, slope = expected(given, lambda x, y, n, m: -ls(BETA * x - shift) - ls(shift - BETA * y))
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)


# -- aot: sorted over the step


def sums(given: LossInputs, column: torch.Tensor) -> torch.Tensor:
    return torch.zeros(given.n_rows, dtype=F64).index_add(0, given.row_of, column)


def sorted_loss(given: LossInputs, paired: bool) -> tuple[float, torch.Tensor]:
    """The paper's: sort both sides of the whole step with autograd through sort, compare equal ranks."""
    policy, reference = sums(given, given.logprobs), sums(given, given.columns["ref_logprobs"])
    if paired:
        upper, lower = policy[0::2] - policy[1::2], reference[0::2] - reference[1::2]
    else:
        ratio = policy - reference
        upper, lower = ratio[0::2], ratio[1::2]
    z = BETA * (upper.sort().values - lower.sort().values)
    ls = torch.nn.functional.logsigmoid
    loss = (-(1 - EPS) * ls(z) - EPS * ls(-z)).mean()
    return loss.item(), torch.autograd.grad(loss, given.logprobs)[0]


@pytest.mark.parametrize("cut", [None, *CUTS])
@pytest.mark.parametrize("paired", [True, False])
def test_aot_sorts_the_whole_step_however_it_is_cut(paired: bool, cut: list[list[int]] | None) -> None:
    given = make_pairs(LENGTHS, settings_for("aot" if paired else "aot_unpaired"), seed=16, spread=1.0)
    policy, reference = (
        sums(given, column).detach().numpy() for column in (given.logprobs, given.columns["ref_logprobs"])
    )
    if paired:
        partners = {
            aot.REFERENCE: aot.paired_partners(policy[0::2] - policy[1::2], reference[0::2] - reference[1::2])
        }
    else:
        partners = {aot.PARTNER: aot.unpaired_partners(*((policy - reference)[side::2] for side in (0, 1)))}
    partners = {name: torch.from_numpy(v) for name, v in partners.items()}
    given = replace(given, row_values={**given.row_values, **partners})
    loss, grad, _ = run(given, cut)
    want, slope = sorted_loss(given, paired)
    assert loss == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(grad, slope, rtol=1e-11, atol=1e-14)
    # and it is not what each pair by itself gives
    assert run(replace(given, settings=settings_for("sigmoid")))[0] != pytest.approx(want, rel=1e-3)


def test_aot_is_refused_without_the_steps_order() -> None:
    for kind, name in (("aot", aot.REFERENCE), ("aot_unpaired", aot.PARTNER)):
        with pytest.raises(ConfigError, match=name):
            run(make_pairs(LENGTHS, settings_for(kind)))


# -- properties

ALL = [*PAPER]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ALL)
def test_the_cut_into_micro_batches_does_not_matter(kind: str, cut: list[list[int]]) -> None:
    given = make_pairs(LENGTHS, settings_for(kind, rpo_alpha=0.7, ld_alpha=0.5), seed=14)
    whole, parts = run(given), run(given, cut)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=1e-15)
    assert parts[2] == pytest.approx(whole[2], rel=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_identical_policies(kind: str) -> None:
    """At the reference the loss is its value at 0, and chosen tokens become likelier, rejected ones not."""
    given = make_pairs((3, 3), settings_for(kind))
    given = replace(given, columns={"ref_logprobs": given.logprobs.detach()})
    loss, grad, metrics = run(given)
    assert loss == pytest.approx(PAPER[kind](0.0, 0.0, 3, 3))
    assert metrics["rewards/margins"] == 0
    if kind == "discopop":  # its known dent: at d = 0 the slope points the wrong way
        assert grad[0] > 0
    elif kind == "apo_down":  # it pushes the chosen side down as well, half as far
        assert grad[3:].min() > 0
        assert (grad[:3] == 0).all()
    else:
        assert grad[:3].max() < 0
        assert grad[3:].min() > 0 if kind != "nca_pair" else grad[3:].min() >= 0


@pytest.mark.parametrize(
    "kind", ["sigmoid", "robust", "hinge", "bco_pair", "nca_pair", "apo_zero", "apo_down"]
)
def test_beta_to_zero_teaches_nothing(kind: str) -> None:
    settings = replace(settings_for(kind), beta=0.0)
    loss, grad, _ = run(make_pairs(LENGTHS, settings))
    assert math.isfinite(loss)
    assert grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("gap", [30.0, 1e3, 1e6])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_extreme_ratios_stay_finite(kind: str, gap: float, divergence: str) -> None:
    """Completions that the policy finds e^gap times more or less likely, in float32 as in a run."""
    if divergence != "reverse_kl" and kind not in (
        "sigmoid",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "discopop",
    ):
        return
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
        reference = logprobs.detach() - gap * torch.tensor(signs)
        given = LossInputs(
            logprobs,
            rows_of((1, 1)),
            2,
            settings_for(kind, f_divergence_type=divergence),
            {"ref_logprobs": reference},
            row_values={PAIR: torch.from_numpy(pair_numbers(1))},
        )
        loss = get_loss("dpo")(given).total(None, torch.ones(2, dtype=F64))
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", ALL)
def test_empty_completions_and_no_pairs(kind: str) -> None:
    for lengths in ((0, 0), (0, 4), ()):
        given = make_pairs(lengths or (0, 0), settings_for(kind))
        if not lengths:
            given = replace(given, n_rows=0, row_values={PAIR: torch.zeros(0, dtype=F64)})
        loss, grad, _ = run(given)
        assert math.isfinite(loss)
        assert torch.isfinite(grad).all()


def test_metrics() -> None:
    given = make_pairs(LENGTHS, settings_for("sigmoid"), seed=15)
    _, _, metrics = run(given)
    ratio, policy = log_ratios(given), sums(given, given.logprobs.detach()).numpy()
    assert metrics["rewards/chosen"] == pytest.approx(BETA * ratio[0::2].mean())
    assert metrics["rewards/rejected"] == pytest.approx(BETA * ratio[1::2].mean())
    assert metrics["rewards/margins"] == pytest.approx(BETA * (ratio[0::2] - ratio[1::2]).mean())
    assert metrics["rewards/accuracies"] == pytest.approx((ratio[0::2] > ratio[1::2]).mean())
    assert metrics["logps/chosen"] == pytest.approx(policy[0::2].mean())
    assert metrics["logps/rejected"] == pytest.approx(policy[1::2].mean())


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0], [1, 2], [0, 1, 2]])
def test_torn_pairs_are_an_error(order: list[int]) -> None:
    given = make_pairs(LENGTHS, settings_for("sigmoid"))
    with pytest.raises(ValueError, match="not pairs"):
        run(given, [order])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss_type": ("sigmod",)}, "sigmod"),
        ({"loss_type": ()}, "is empty"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "loss_weights has 1"),
        ({"beta": -0.1}, "beta"),
        ({"loss_type": ("ipo",), "beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": ("exo_pair",)}, "0.001 is usual"),
        ({"loss_type": ("hinge",), "label_smoothing": 0.1}, "does nothing"),
        ({"f_divergence_type": "kl"}, "f_divergence_type"),
        ({"loss_type": ("sppo_hard",), "f_divergence_type": "js_divergence"}, "no meaning"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, "between 0"),
        ({"rpo_alpha": -1.0}, "rpo_alpha"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
        ({"loss_type": ("bco_pair",), "ld_alpha": 0.5}, "bco_shift false"),
        ({"discopop_tau": 0.0}, "discopop_tau"),
    ],
)
def test_impossible_settings(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DPOSettings(**bad)
