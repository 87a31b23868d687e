"""The auxiliary loss of a mixture's routers: Transformers' own on the whole step, however the step is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from raytune_rl.data.collate import Layout, collate
from raytune_rl.errors import ModelError
from raytune_rl.models.load import enable_gradient_checkpointing, load_model
from raytune_rl.models.routing import ExpertLoad, check_balanced, experts_per_token, router_sums
from raytune_rl.models.scorer import TokenScorer
from tests.families.recipes import make_family

LENGTHS = (7, 3, 12, 5, 9)
CUTS = [[[0, 1, 2, 3, 4]], [[2], [0, 4], [3, 1]], [[4, 3, 2], [], [1, 0]]]


def rows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 60, size=n).astype(np.int32) for n in LENGTHS]


def score(scorer: TokenScorer, members: list[int], layout: Layout) -> Any:
    tokens = [rows()[row] for row in members]
    masks = [np.arange(len(row)) > len(row) // 2 for row in tokens]
    micro = collate(tokens, masks, layout=layout, pad_token_id=0)
    scored = scorer(
        micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index, micro.targets,
        with_router=True,
    )  # fmt: skip
    return scored, float(micro.n_rows > 0)


def step(scorer: TokenScorer, cut: list[list[int]], layout: Layout) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and its gradient, as the trainer adds them up."""
    parts = [score(scorer, members, layout) for members in cut]
    counts = torch.stack([scored.router_counts * real for scored, real in parts]).sum(0)
    load = ExpertLoad(counts, experts_per_token(scorer.model.config))
    loss = torch.stack([load.share(scored.router_probabilities) * real for scored, real in parts]).sum()
    scorer.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_it_is_transformers_loss_of_the_whole_step_for_any_cut(family: str, tmp_path: Path) -> None:
    model = load_model(str(make_family(family, tmp_path / family, tied=False))).model
    scorer = TokenScorer(model).eval()
    tokens = rows()
    micro = collate(tokens, [np.arange(len(r)) > 0 for r in tokens], layout="padded", pad_token_id=0)
    assert micro.attention_mask is not None
    logits = model.base_model(
        input_ids=micro.input_ids, attention_mask=micro.attention_mask, output_router_logits=True
    ).router_logits
    theirs = load_balancing_loss_func(
        logits, logits[0].shape[-1], experts_per_token(model.config), micro.attention_mask
    )
    model.zero_grad()
    theirs.backward()
    want = {f"model.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name and grad.abs().sum() > 0 for name, grad in want.items())
    for layout in ("padded", "packed"):
        for cut in CUTS:
            loss, grads = step(scorer, cut, layout)  # type: ignore[arg-type]
            assert loss == pytest.approx(theirs.item(), rel=1e-5)
            for name, grad in want.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7)
    enable_gradient_checkpointing(model)
    scorer.train()
    loss, grads = step(scorer, CUTS[1], "padded")
    for name, grad in want.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7)


def test_an_even_load_is_the_number_of_choices_and_an_uneven_one_more() -> None:
    """f_e = P_e E = k / E and 1 / E: the loss is k; all tokens with one expert: E."""
    even = torch.eye(4).repeat(3, 1) * 1e-6
    for logits, chosen, want in ((even, 1, 1.0), (torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1), 1, 4.0)):
        probabilities, counts = router_sums((logits, logits), None, chosen)
        assert ExpertLoad(counts, chosen).share(probabilities).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "glm4_moe"])
def test_what_has_no_such_loss_is_refused(family: str, tmp_path: Path) -> None:
    check_balanced(load_model(str(make_family("qwen2_moe", tmp_path / "with", tied=False))).model)
    model = load_model(str(make_family(family, tmp_path / "without", tied=False))).model
    with pytest.raises(ModelError, match=f"no load-balancing loss for {type(model).__name__}"):
        check_balanced(model)


def test_a_model_without_routers_says_so(tmp_path: Path) -> None:
    model = load_model(str(make_family("qwen2", tmp_path / "m", tied=True))).model
    with pytest.raises(ModelError, match="does not say how many experts"):
        experts_per_token(model.config)
    with pytest.raises(ModelError, match="Qwen2ForCausalLM does not tell what its routers chose"):
        score(TokenScorer(model), [0], "padded")
