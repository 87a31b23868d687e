"""Teachers that vLLM serves: their engines, their GPUs, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config

from raytune_rl.config import RLHFConfig
from raytune_rl.errors import ConfigError
from raytune_rl.groups import teacher_specs
from raytune_rl.groups.memory_check import Sizes, device_plans
from raytune_rl.groups.memory_plan import GIB
from raytune_rl.groups.sizes import Groups, online_groups
from raytune_rl.groups.teachers import longest_seen
from raytune_rl.models.size import measure
from raytune_rl.protocol.data import TEACHER_PROMPT_TOKENS, PromptSet
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.runtime.cluster import ClusterInfo

GIVEN: dict[str, Any] = {
    "model": "m", "dataset": "d", "reward_funcs": "accuracy", "teacher_model": "t",
    "teacher_backend": "vllm",
}  # fmt: skip


def groups_of(gpus: int, **settings: Any) -> tuple[RLHFConfig, Groups]:
    config = RLHFConfig(**{**GIVEN, **settings})
    have = {"CPU": 16.0, **({"GPU": float(gpus)} if gpus else {})}
    return config, online_groups(config, ClusterInfo(False, "", {"a": have}, 0, has_gpus=gpus > 0), ())


def test_a_copy_is_spread_over_its_gpus() -> None:
    config, groups = groups_of(8, colocate=False, gpus_per_teacher_worker=4, teacher_workers=1)
    teacher_specs.check(config, groups, takes_media=False)
    spec = teacher_specs.served(config, groups, "teacher", "t", 128)
    assert (spec.tensor_parallel_size, spec.dtype, spec.max_model_len) == (4, "bfloat16", 128)
    config, groups = groups_of(0)
    teacher_specs.check(config, groups, takes_media=False)
    spec = teacher_specs.served(config, groups, "teacher", "t", 128)
    assert (spec.tensor_parallel_size, spec.dtype) == (1, "float32")


def test_it_takes_its_gpus_memory() -> None:
    config, groups = groups_of(8, colocate=False, gpus_per_teacher_worker=2)
    size = measure(Qwen2Config(), TunerSettings())
    plans = device_plans(config, groups, Sizes(size, teachers=(size,)), 80 * GIB)
    (teacher,) = [plan for plan in plans if plan.groups == ("teacher",)]
    held = teacher.held("teacher log-probs")["teacher"]
    assert held["weights"] == size.parameters
    assert held["KV cache"] > 50 * GIB


@pytest.mark.parametrize(
    ("gpus", "settings", "takes_media", "sentence"),
    [
        (8, {}, False, "wants GPUs of its own.* --colocate false"),
        (8, {"colocate": False, "gpus_per_teacher_worker": 0}, False, "--gpus_per_teacher_worker 0"),
        (0, {}, True, "reads texts only"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(
    gpus: int, settings: dict[str, Any], takes_media: bool, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        teacher_specs.check(*groups_of(gpus, **settings), takes_media)


def test_the_longest_row_is_behind_the_longest_prompt() -> None:
    def prompts(**values: Any) -> PromptSet:
        return PromptSet("p", None, None, np.array([4, 9]), None, values)  # type: ignore[arg-type]

    assert longest_seen(prompts(), 20, None) == 20
    assert longest_seen(prompts(**{TEACHER_PROMPT_TOKENS: np.array([11.0, 3.0])}), 20, None) == 27
    assert longest_seen(prompts(**{TEACHER_PROMPT_TOKENS: np.array([1.0, 3.0])}), 20, prompts()) == 20
    answers: Any = prompts()
    assert longest_seen(prompts(), 8, answers) == 9
