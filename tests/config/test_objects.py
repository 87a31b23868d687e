"""Config objects from Python: validated, frozen, and silent about secrets."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import ExportConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.config.flags import flags_of
from raytune_rl.errors import ConfigError

GIVEN: dict[str, Any] = {"model": "m", "dataset": ["d"], "reward_funcs": ["accuracy", "format"]}


def sft(**more: Any) -> SFTConfig:
    return SFTConfig(**({"model": "m", "dataset": ["d"]} | more))


def rlhf(**more: Any) -> RLHFConfig:
    return RLHFConfig(**(GIVEN | more))


def test_every_setting_is_explained_and_grouped() -> None:
    for config_class in (SFTConfig, RLHFConfig, ExportConfig):
        for flag in flags_of(config_class).values():
            assert flag.help.endswith((".", "1.", "'.")), flag.name
            assert flag.group != "Other", flag.name


def test_a_config_is_frozen_travels_and_comes_back_from_its_own_json() -> None:
    config = rlhf(columns={"question": "query"}, beta=0, deepspeed={"zero_optimization": {"stage": 1}})
    with pytest.raises(ValueError, match="frozen"):
        config.beta = 1.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert RLHFConfig(**json.loads(json.dumps(config.args()))) == config


def test_one_value_stands_for_a_list_and_a_path_for_its_text() -> None:
    config = sft(dataset=Path("a") / "b.jsonl", model=Path("here"))
    assert config.dataset == (str(Path("a") / "b.jsonl"),)
    assert config.model == "here"


def test_what_the_user_gave_is_known() -> None:
    config = sft(lora_rank=8)
    assert config.is_set("lora_rank")
    assert not config.is_set("lora_alpha")


def test_the_token_appears_nowhere(tmp_path: Path) -> None:
    secret = "hf_verysecret"
    config = ExportConfig(adapters="a", push_to_hub=True, hub_model_id="me/it", hub_token=secret)
    assert config.hub_token.get_secret_value() == secret
    for shown in (repr(config), str(config), str(config.model_dump()), json.dumps(config.args())):
        assert secret not in shown
    assert "hub_token" not in config.args()
    with pytest.raises(ConfigError) as wrong:
        ExportConfig(adapters="a", push_to_hub=True, hub_model_id="me/it", hub_token=[secret])
    assert secret not in str(wrong.value)


WRONG = [
    ({"lerning_rate": 1}, "Did you mean learning_rate?"),
    ({"lora_rank": "eight"}, "--lora_rank: 'eight' is not a whole number"),
    ({"train_type": "qlora"}, "--train_type: 'qlora' is not one of: lora, full"),
    ({"learning_rate": float("nan")}, "--learning_rate: nan is not a finite number"),
    ({"model": None}, "--model is required"),
    ({"dataset": []}, "--dataset is required"),
    ({"warmup_ratio": 1.0}, "--warmup_ratio: 1.0 must be less than 1"),
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "--warmup_ratio 0.1 and --warmup_steps 3"),
    ({"max_steps": 5, "warmup_steps": 6}, "--warmup_steps 6 is more than --max_steps 5"),
    ({"max_steps": 0}, "--max_steps 0"),
    ({"quant_bits": 4}, "--quant_method and --quant_bits go together"),
    ({"quant_method": "bnb", "quant_bits": 4, "train_type": "full"}, "--train_type full cannot train"),
    ({"use_dora": True, "train_type": "full"}, "--use_dora"),
    ({"target_modules": []}, "--target_modules is empty"),
    ({"val_dataset": "v", "split_dataset_ratio": 0.1}, "--val_dataset and --split_dataset_ratio"),
    ({"deepspeed": "zero5"}, "Did you mean zero"),
    ({"report_to": ["none", "wandb"]}, "--report_to none stands alone"),
    ({"columns": "{"}, "--columns: '{' is not JSON"),
    ({"gpus_per_policy_worker": 1.5}, "--gpus_per_policy_worker 1.5"),
]
WRONG_RL = [
    ({"rlhf_type": "gkd"}, "needs somebody to learn from"),
    (
        {"rlhf_type": "gkd", "teacher_model": ["a", "b"]},
        "takes one teacher a row",
    ),
    (
        {"rlhf_type": "gkd", "teacher_model": ["a", "b"], "teacher_column": "whose"},
        "which have no --teacher_column",
    ),
    ({"rlhf_type": "dpo"}, "its settings are a PreferenceConfig"),
    ({"num_generations": 1}, "needs at least 2"),
    ({"temperature": 0}, "--temperature: 0 must be at least 0.01"),
    ({"top_k": 0}, "--top_k 0"),
    ({"reward_funcs": []}, "--reward_funcs is required"),
    ({"reward_weights": [1.0]}, "--reward_weights has 1 values but --reward_funcs names 2"),
    (
        {"steps_per_generation": 1, "generation_batch_size": 8},
        "--steps_per_generation 1 and --generation_batch_size 8",
    ),
    ({"delta": 1.2, "epsilon_high": 0.28}, "--delta 1.2 must be over 1 + --epsilon_high = 1.28"),
    ({"truncation_strategy": "right"}, "--truncation_strategy right"),
    ({"use_vllm": False}, "--use_vllm false"),
    ({"vllm_max_model_len": 512}, "--vllm_max_model_len 512 must hold"),
    ({"vllm_max_model_len": 600, "max_length": 100}, "must be at least 612"),
    ({"vllm_enable_lora": True, "train_type": "full"}, "--vllm_enable_lora true needs --train_type lora"),
    ({"vllm_max_lora_rank": 4}, "--vllm_max_lora_rank 4 is less than --lora_rank 8"),
    ({"vllm_mode": "server", "colocate": True}, "say the opposite"),
    ({"policy_workers": 3}, "One generation is 3 completions"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_mistakes_in_any_training(settings: dict[str, Any], message: str) -> None:
    for make in (sft, rlhf):
        with pytest.raises(ConfigError) as wrong:
            make(**settings)
        assert message in str(wrong.value)


@pytest.mark.parametrize(("settings", "message"), WRONG_RL)
def test_mistakes_in_reinforcement_learning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        rlhf(**settings)
    assert message in str(wrong.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Nothing to export"),
        ({"merge_lora": True}, "--adapters names 0"),
        (
            {"push_to_hub": True, "hub_model_id": "me/it", "adapters": ["a", "b"]},
            "--adapters names 2",
        ),
        ({"push_to_hub": True, "adapters": "a"}, "--hub_model_id"),
        ({"push_to_hub": True, "hub_model_id": "me/it"}, "something to push"),
    ],
)
def test_mistakes_in_export(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        ExportConfig(**settings)
    assert message in str(wrong.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as wrong:
        sft(lora_rank=0, seed=-1)
    assert "--lora_rank: 0 must be at least 1" in str(wrong.value)
    assert "--seed: -1 must be at least 0" in str(wrong.value)


def test_defaults_that_depend_on_others() -> None:
    assert resolved.learning_rate(sft()) == 1e-4
    assert resolved.learning_rate(sft(train_type="full")) == 1e-5
    assert resolved.learning_rate(sft(train_type="full", learning_rate=3.0)) == 3.0
    assert resolved.num_generations_eval(rlhf(num_generations=4)) == 4
    assert resolved.eval_steps(sft(save_steps=7)) == 7
    for settings, save, evaluate in (
        ({}, 500, 500),
        ({"save_steps": 7, "eval_steps": 3}, 7, 3),
        ({"save_strategy": "epoch"}, 20, 20),
        ({"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3}, 20, 3),
        ({"eval_strategy": "epoch", "save_steps": 7}, 7, 20),
    ):
        assert resolved.checkpoint_interval(sft(**settings), 20) == save
        assert resolved.evaluation_interval(sft(**settings), 20) == evaluate
    assert resolved.truncation_strategy(sft()) == "delete"
    assert resolved.truncation_strategy(rlhf()) == "left"
    assert resolved.reward_weights(rlhf()) == (1.0, 1.0)
    assert resolved.reward_weights(rlhf(reward_weights=[2, 0])) == (2.0, 0.0)
    assert resolved.colocate(rlhf()) is None
    assert resolved.colocate(rlhf(vllm_mode="server")) is False
    assert resolved.colocate(rlhf(colocate=True)) is True


@pytest.mark.parametrize(("total", "expected"), [(0, 0), (1, 1), (10, 1), (20, 1), (21, 2), (100, 5)])
def test_warmup_is_rounded_up(total: int, expected: int) -> None:
    assert resolved.warmup_steps(sft(warmup_ratio=0.05), total) == expected
    assert resolved.warmup_steps(sft(warmup_steps=3), total) == 3
    assert resolved.warmup_steps(sft(), total) == 0
