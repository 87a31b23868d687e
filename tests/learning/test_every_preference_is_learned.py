"""Every loss of preference pairs, labels and scores raises the margin on rows that nobody trained on; with a
sign turned around or the wrong tokens in the loss it does not, so the test would notice.

Left out is discopop: its slope at the reference points the wrong way (`tests/algorithms/test_dpo.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raytune_rl.config import PreferenceConfig
from raytune_rl.tiny.model import make_tiny_model
from raytune_rl.tiny.preferences import write_preferences
from tests.learning.preference_loop import Broken, Learner, Start

# A gain is in nats of log-prob (rm: in scores) of a whole answer.
ALGORITHMS: dict[str, dict[str, Any]] = {
    **{
        f"dpo {kind}": {"loss_type": kind}
        for kind in (
            "sigmoid", "hinge", "ipo", "robust", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down",
        )
    },
    "dpo exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.01},
    "dpo bco_pair without its shift": {"loss_type": "bco_pair", "bco_shift": False},
    "dpo js_divergence": {"f_divergence_type": "js_divergence"},
    "dpo alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "dpo smoothed, desensitised to length": {"label_smoothing": 0.1, "ld_alpha": 0.5},
    "dpo mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "dpo rpo": {"rpo_alpha": 0.1},
    "kto": {},
    "kto apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "orpo": {"beta": 1.0},
    "cpo": {"cpo_alpha": 0.1},
    "cpo hinge": {"loss_type": "hinge", "beta": 0.02, "cpo_alpha": 0.1},
    "cpo ipo": {"loss_type": "ipo", "cpo_alpha": 0.0},
    "simpo": {"cpo_alpha": 0.0},
    "rm": {"center_rewards_coefficient": 0.01},
}  # fmt: skip


WITH_LIKELIHOOD = ("dpo mpo", "dpo rpo", "cpo", "orpo")
"""Those that make right answers likelier by themselves."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    root = tmp_path_factory.mktemp("preferences")
    model = make_tiny_model(root / "tiny", hidden=64, layers=2)
    return Start(model, write_preferences(root / "data", train=96, held_out=16))


def gains(start: Start, name: str, broken: Broken | None = None) -> tuple[float, float]:
    """The gain of training on right and on wrong answers."""
    config = PreferenceConfig(model="tiny", dataset="sums", rlhf_type=name.split()[0], **ALGORITHMS[name])
    learner = Learner(start, config, broken or Broken())
    before = learner.sides()
    learner.learn(steps=6, size=12, rate=2e-3)
    after = learner.sides()
    return after[0] - before[0], after[1] - before[1]


def gain(start: Start, name: str, broken: Broken | None = None) -> float:
    """The gain of training in the held-out margin."""
    right, wrong = gains(start, name, broken)
    return right - wrong


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_held_out_margin_rises(start: Start, name: str) -> None:
    right, wrong = gains(start, name)
    assert right - wrong > 3.0
    if name in WITH_LIKELIHOOD:
        assert right > 12.0, "nats; it would be less with the likelihood of the wrong answer"


@pytest.mark.parametrize("name", ["dpo sigmoid", "kto", "orpo", "cpo", "simpo", "rm"])
def test_what_is_broken_does_not(start: Start, name: str) -> None:
    """A sign turned around, and the prompt in the loss instead of the answer."""
    assert gain(start, name, Broken(loss=torch.neg)) < -3.0
    if name != "rm":
        assert gain(start, name, Broken(masks=lambda mask: np.arange(len(mask)) * ~mask > 0)) < 1.5
