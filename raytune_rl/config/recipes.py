"""Algorithms that are another one with settings of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Yu et al. 2025, "DAPO: an open-source LLM reinforcement learning system at scale", section 3.
    "dapo": {
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "beta": 0.0,
        "dynamic_sample": True,
        "overlong_filter": True,
    },
    # Agarwal et al. 2024, "On-policy distillation of language models"; ms-swift's defaults.
    "gkd": {"loss_type": "gkd", "advantage_estimator": "distill", "beta": 0.0, "num_generations": 1},
}
"""`rlhf_type` -> the settings it stands for, each of which the user may override."""

OF_A_CLIP = ("epsilon_high",)
"""Settings that mean something else with `loss_type` cispo: its cap is no clip range, and has no default."""


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and those of the recipe that they name and do not override."""
    settings = dict(given)
    recipe = RECIPES.get(str(settings.get("rlhf_type")), {})
    if settings.get("rlhf_type") == "gkd" and "beta" in settings and "jsd_beta" not in settings:
        # ms-swift's name; here --beta is the weight of a KL to the reference.
        settings["jsd_beta"] = settings.pop("beta")
    if settings.get("loss_type") == "cispo":
        recipe = {name: value for name, value in recipe.items() if name not in OF_A_CLIP}
    return {**recipe, **settings}


def recipe_in_words(name: str) -> str:
    """The flags a recipe stands for."""
    return " ".join(f"--{flag} {str(value).lower()}" for flag, value in RECIPES[name].items())
