"""A teacher that is asked something else than the policy: its log-probs are those of plain Transformers on
its own prompt with the policy's completion behind it, shared prompts or not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytune_rl.algorithms.distillation import TEACHER_COLUMNS, ReverseKL
from raytune_rl.data.prefix_plan import Budget, plan_step
from raytune_rl.groups.teachers import as_seen
from raytune_rl.groups.world import rank_share
from raytune_rl.protocol.columns import Columns, Ragged
from raytune_rl.protocol.data import TEACHER_PROMPT, TEACHER_PROMPT_TOKENS, Account, PromptSet
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Sharing
from raytune_rl.protocol.rows import Prefixes, RowPointer, TrainBatch
from raytune_rl.protocol.trajectory import EpisodeFacts, Trajectory
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.workers import scoring
from raytune_rl.workers.teacher import TeacherWorker

TEMPERATURE, PROMPTS, PER = 0.8, 2, 3
DRAW = np.random.default_rng(5)
OWN = [DRAW.integers(5, 200, n).astype(np.int32) for n in (7, 12)]
ASKED = [DRAW.integers(5, 200, n).astype(np.int32) for n in (21, 4)]
ANSWERS = [DRAW.integers(5, 200, 3 + row).astype(np.int32) for row in range(PROMPTS * PER)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", hidden=64, layers=2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> TrainBatch:
    """The completions as teachers see them; the second token of each was put there by an environment."""
    tokens = [np.concatenate([OWN[row // PER], answer]) for row, answer in enumerate(ANSWERS)]
    masks = [np.arange(len(t)) >= len(OWN[row // PER]) for row, t in enumerate(tokens)]
    for row, mask in enumerate(masks):
        mask[len(OWN[row // PER]) + 1] = False
    store: dict[str, Columns] = {
        "rollout": {
            "tokens": Ragged.from_rows(tokens, np.int32),
            "loss_mask": Ragged.from_rows(masks, np.bool_),
            "logprobs": Ragged.from_rows([np.full(m.sum(), -1.0) for m in masks], np.float32),
        },
        "prompts": {
            "prompt": Ragged.from_rows(OWN, np.int32),
            TEACHER_PROMPT: Ragged.from_rows(ASKED, np.int32),
        },
    }
    monkeypatch.setattr(scoring.ray, "get", lambda refs, timeout: [store[ref] for ref in refs])
    facts = [
        EpisodeFacts(r // PER, r % PER, r, len(OWN[r // PER]), int(m.sum()), "stop", 0, other_tokens=1)
        for r, m in enumerate(masks)
    ]
    made = [
        Trajectory(r // PER, r // PER, RowPointer("rollout", r), RowPointer("texts", r), facts[r])
        for r in range(len(tokens))
    ]
    lengths = np.array([len(t) for t in tokens])
    values = {TEACHER_PROMPT_TOKENS: np.array([float(len(a)) for a in ASKED])}
    prompts = PromptSet(
        "prompts", None, None, np.array([len(o) for o in OWN]), Account((), {}, None, (), None, ()), values
    )
    own = Prefixes(np.repeat(range(PROMPTS), PER), np.repeat([len(o) for o in OWN], PER))
    places = [t.data for t in made]
    batch = TrainBatch(places, lengths, {"old_logprobs": places}, prefixes=own)
    return as_seen(batch, made, prompts)


def by_transformers(path: Path) -> list[torch.Tensor]:
    """Log-probs at every sampled token over the vocabulary, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for row, answer in enumerate(ANSWERS):
        ids = torch.from_numpy(np.concatenate([ASKED[row // PER], answer])).long()[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(ASKED[row // PER]) - 1 : -1] / TEMPERATURE
        sampled = [k for k in range(len(answer)) if k != 1]
        found.append(logits.log_softmax(-1)[sampled])
    return found


def chosen(row: int) -> torch.Tensor:
    return torch.from_numpy(np.delete(ANSWERS[row], 1)).long()[:, None]


@pytest.mark.parametrize("sharing", ["false", "true"])
def test_it_scores_its_own_prompt_with_the_same_completion(
    path: Path, seen: TrainBatch, sharing: Sharing
) -> None:
    assert seen.lengths.tolist() == [len(ASKED[r // PER]) + len(a) for r, a in enumerate(ANSWERS)]
    worker = TeacherWorker(
        ModelSpec(str(path), "float32", None, "padded", sharing="auto"), ScoreSettings(TEMPERATURE, 10.0)
    )
    plan = plan_step(seen.lengths, seen.prefixes, Budget(1, 64, "padded", sharing))
    share = rank_share(plan, 0, seen.with_scalars(advantage=np.zeros(len(seen))))
    assert plan.shares == (sharing == "true")
    wanted = by_transformers(path)
    _, scored = worker.logprobs(share.batch)
    _, advice = worker.advise(share.batch, ReverseKL(2.0))
    _, tops = worker.distributions(share.batch, 0)
    ids, known = (tops[name] for name in TEACHER_COLUMNS)
    for place, row in enumerate(share.rows):
        want = wanted[row].gather(-1, chosen(row)).squeeze(-1).numpy()
        np.testing.assert_allclose(scored["logprobs"][place], want, rtol=0, atol=2e-5)
        np.testing.assert_allclose(advice["advantages"][place], 2 * (want + 1.0), rtol=0, atol=5e-5)
        vocabulary = wanted[row].shape[-1]
        order = torch.from_numpy(np.array(ids[place])).long().view(-1, vocabulary)
        top = torch.from_numpy(np.array(known[place])).view(-1, vocabulary)
        torch.testing.assert_close(top, wanted[row].gather(-1, order), rtol=0, atol=5e-5)
