"""Every command of the seed parses as it stands, with `swift` replaced by `raytune-rl`."""

import pytest

from raytune_rl.config import ExportConfig, RLHFConfig, SFTConfig, resolved
from raytune_rl.config.batching import grpo_batch_of, sft_schedule_of
from raytune_rl.config.parser import Parsed, parse
from tests.data.seed_commands.extract import SeedCommand, seed_commands

COMMANDS = {command.name: command for command in seed_commands()}
CLASSES = {"sft": SFTConfig, "rlhf": RLHFConfig, "export": ExportConfig}


def parsed(name: str) -> Parsed:
    command = COMMANDS[name]
    return parse(command.argv, CLASSES[command.command], environ=dict(command.environ))


def test_all_commands_of_the_document_are_found() -> None:
    assert list(COMMANDS) == [
        "sft-llm-1gpu", "sft-mllm-1gpu", "sft-llm-8gpu", "sft-mllm-8gpu",
        "rlhf-llm-1gpu", "rlhf-mllm-1gpu", "rlhf-llm-8gpu", "rlhf-mllm-8gpu",
        "export-merge", "export-push",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_every_written_value_arrives(command: SeedCommand) -> None:
    result = parsed(command.name).config
    special = {"num_infer_workers", "vllm_device", "gc_collect_after_offload", "hub_token"}
    seen = 0
    last: dict[str, list[str]] = {}
    for word in command.argv:
        if word.startswith("--"):
            name = word[2:]
            last[name] = []
        else:
            last[name].append(word)
    for name, words in last.items():
        if name in special:
            continue
        value = getattr(result, name)
        shown = [str(item) for item in value] if isinstance(value, tuple) else [str(value)]
        if isinstance(value, bool):
            shown = [str(value).lower()]
        if isinstance(value, float):
            shown, words = [str(value)], [str(float(words[0]))]
        assert shown == words, name
        seen += 1
    assert seen >= 2


def test_sft_on_one_gpu() -> None:
    config = parsed("sft-llm-1gpu").config
    assert config.model == "Qwen/Qwen2.5-7B-Instruct"
    assert config.dataset == ("AI-ModelScope/alpaca-gpt4-data-zh",)
    assert config.learning_rate == 1e-4
    assert config.warmup_ratio == 0.05
    assert config.system == "You are a helpful assistant."
    assert resolved.attention(config) == "flash_attention_2"
    assert config.policy_workers == 1
    assert sft_schedule_of(config, 1, n_rows=100).rows_per_step == 16


def test_sft_on_eight_gpus() -> None:
    result = parsed("sft-llm-8gpu")
    assert result.config.policy_workers == 8
    assert result.config.deepspeed == "zero2"
    assert sft_schedule_of(result.config, 8, n_rows=1000).rows_per_step == 128
    assert "NPROC_PER_NODE=8 is read as --policy_workers 8." in result.notices


def test_grpo_on_one_gpu() -> None:
    result = parsed("rlhf-llm-1gpu")
    config = result.config
    assert config.rlhf_type == "grpo"
    assert config.reward_funcs == ("accuracy", "format")
    assert config.sleep_level == 1
    assert config.offload_model
    assert config.offload_optimizer
    assert config.log_completions
    assert config.beta == 0.04
    batch = grpo_batch_of(config, 1)
    assert (batch.completions_per_step, batch.prompts_per_step) == (4, 1)
    assert [n for n in result.notices if "gc_collect_after_offload" in n] != []


def test_grpo_on_eight_gpus_is_colocated_on_all_of_them() -> None:
    result = parsed("rlhf-llm-8gpu")
    config = result.config
    assert (config.policy_workers, config.rollout_workers, config.colocate) == (8, 8, True)
    batch = grpo_batch_of(config, 8)
    assert (batch.completions_per_step, batch.prompts_per_step) == (16, 2)
    assert any("--log_completions is given more than once" in n for n in result.notices)
    assert any(
        "--num_infer_workers 8 is read as --rollout_workers 8 --colocate true" in n for n in result.notices
    )


def test_grpo_with_images_takes_the_last_of_two_values_and_says_so_once() -> None:
    result = parsed("rlhf-mllm-8gpu")
    assert result.config.vllm_max_model_len == 4196
    assert result.config.external_plugins == ("examples/train/grpo/plugin/plugin.py",)
    assert result.config.reward_funcs == ("external_r1v_acc", "format")
    assert sum("--vllm_max_model_len" in n for n in result.notices) == 1


def test_the_images_variable_is_read_as_a_flag() -> None:
    for name in ("sft-mllm-1gpu", "sft-mllm-8gpu", "rlhf-mllm-1gpu"):
        assert len([n for n in parsed(name).notices if n.startswith("MAX_PIXELS")]) == 1
        assert parsed(name).config.max_pixels == 602112


@pytest.mark.parametrize("name", COMMANDS)
def test_notices_are_single_lines_said_once(name: str) -> None:
    notices = parsed(name).notices
    assert len(set(notices)) == len(notices)
    assert not [n for n in notices if "\n" in n]


def test_export() -> None:
    merge = parsed("export-merge").config
    assert merge.adapters == ("output/checkpoint-xxx",)
    assert merge.merge_lora
    push = parsed("export-push").config
    assert push.push_to_hub
    assert push.hub_model_id == "<your-namespace>/<model-name>"
    assert push.hub_token.get_secret_value() == "<your-access-token>"
