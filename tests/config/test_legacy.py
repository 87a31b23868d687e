"""ms-swift's old flags."""

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import ExportConfig, InferConfig, PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.flags import flags_of
from raytune_rl.config.legacy import EXTERNAL_SERVER, REMOVED, RENAMED
from raytune_rl.config.not_offered import IDLE, NOT_BUILT
from raytune_rl.config.parser import Parsed, parse
from raytune_rl.errors import ConfigError

CONFIGS = (SFTConfig, RLHFConfig, PPOConfig, PreferenceConfig, InferConfig, ExportConfig)
BASE = ["--model", "m", "--dataset", "d", "--reward_funcs", "accuracy", "--num_generations", "2"]


def rlhf(*argv: str, environ: dict[str, str] | None = None) -> Parsed[RLHFConfig]:
    argv = (*BASE, "--per_device_train_batch_size", "2", *argv)
    return parse(argv, RLHFConfig, environ={} if environ is None else environ)


def test_the_tables_fit_the_settings() -> None:
    flags = flags_of(RLHFConfig)
    assert set(RENAMED.values()) <= set(flags)
    everywhere = {name for config in CONFIGS for name in flags_of(config)}
    for name in RENAMED:
        assert name not in flags
    for name in (*REMOVED, *EXTERNAL_SERVER, *NOT_BUILT, *IDLE):
        assert name not in everywhere
    assert not set(NOT_BUILT) & set(IDLE)


def test_what_happens_anyway_is_read_and_anything_else_refused() -> None:
    argv = ["--model", "m", "--dataset", "d"]
    read = parse(
        [*argv, "--logging_strategy", "steps", "--lazy_tokenize", "--optim", "adamw_torch"],
        SFTConfig,
        environ={},
    )
    assert len(read.notices) == 3
    assert all("does nothing" in notice for notice in read.notices)
    for wrong in (
        ["--logging_strategy", "epoch"],
        ["--optim", "adafactor"],
        ["--logging_first_step", "false"],
    ):
        with pytest.raises(ConfigError, match="is not built here, only"):
            parse([*argv, *wrong], SFTConfig, environ={})


def test_what_is_not_built_is_refused_with_what_to_do_instead() -> None:
    for words, said in (
        (["--bf16", "true"], "--bf16 is a flag of ms-swift that is not built yet: say --torch_dtype."),
        (["--neftune_noise_alpha", "5"], "that is not built yet."),
        (["--vit_lr", "1e-6"], "one --learning_rate holds for all"),
    ):
        with pytest.raises(ConfigError) as refused:
            parse(["--model", "m", "--dataset", "d", *words], SFTConfig, environ={})
        assert said in str(refused.value)


def test_no_flag_of_ms_swift_is_taken_for_a_misspelling() -> None:
    """The flags that people use, beside those of the document: offered, read as another, or refused by
    name.
    """
    names = (Path(__file__).parents[1] / "data" / "ms_swift_flags.txt").read_text().split()
    assert len(names) > 150

    def answer(name: str, config_class: type[Any]) -> str:
        try:
            parse(["--model", "m", "--dataset", "d", f"--{name}", "1"], config_class, environ={})
        except ConfigError as error:
            return str(error)
        return ""

    for config_class in (SFTConfig, RLHFConfig):
        assert [name for name in names if "Unknown flag" in answer(name, config_class)] == []


def test_renamed_flags_act_and_say_so_once() -> None:
    result = rlhf(
        "--tuner_type", "full", "--custom_register_path", "a.py", "b.py", "--tensor_parallel_size", "2"
    )
    config = result.config
    assert (config.train_type, config.external_plugins) == ("full", ("a.py", "b.py"))
    assert config.vllm_tensor_parallel_size == 2
    assert result.notices == (
        "--tuner_type is read as --train_type.",
        "--custom_register_path is read as --external_plugins.",
        "--tensor_parallel_size is read as --vllm_tensor_parallel_size.",
    )


def test_old_and_new_name_are_duplicates_of_each_other() -> None:
    result = rlhf("--train_type", "lora", "--tuner_type", "full")
    assert result.config.train_type == "full"
    assert any("--train_type is given more than once" in n for n in result.notices)


def test_old_names_in_a_file_yield_to_flags(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("tuner_type: full\nmodel: m\ndataset: d\n")
    assert parse([str(file)], SFTConfig, environ={}).config.train_type == "full"
    assert parse([str(file), "--train_type", "lora"], SFTConfig, environ={}).config.train_type == "lora"


@pytest.mark.parametrize(
    ("written", "value"), [("true", "group"), ("False", "none"), ("batch", "batch"), ("none", "none")]
)
def test_scale_rewards_was_a_boolean(written: str, value: str) -> None:
    assert rlhf("--scale_rewards", written).config.scale_rewards == value


PLACES = [
    # engines, processes, visible devices -> colocated
    (8, 8, 8, True),
    (8, 8, None, True),
    (1, None, 1, True),
    (1, None, None, True),
    (1, 7, 8, False),
    (4, 4, 8, False),
    (2, 6, None, False),
    (1, None, 2, False),
]


@pytest.mark.parametrize(("engines", "processes", "visible", "colocated"), PLACES)
def test_number_of_engines(engines: int, processes: int | None, visible: int | None, colocated: bool) -> None:
    environ = {}
    if processes is not None:
        environ["NPROC_PER_NODE"] = str(processes)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(visible)))
    config = rlhf("--vllm_device", "auto", "--num_infer_workers", str(engines), environ=environ).config
    assert (config.rollout_workers, config.colocate) == (engines, colocated)


def test_policy_workers_of_the_command_line_count_too() -> None:
    config = rlhf("--policy_workers", "3", "--num_infer_workers", "1").config
    assert (config.rollout_workers, config.colocate) == (1, False)


def test_devices_by_name() -> None:
    apart = rlhf("--vllm_device", "cuda:2", "cuda:3", environ={"NPROC_PER_NODE": "2"})
    assert (apart.config.rollout_workers, apart.config.colocate) == (2, False)
    assert any("Ray chooses which" in n for n in apart.notices)
    shared = rlhf("--vllm_device", "cuda:0").config
    assert (shared.rollout_workers, shared.colocate) == (1, True)


def test_auto_alone_leaves_placement_to_ray() -> None:
    result = rlhf("--vllm_device", "auto")
    assert (result.config.rollout_workers, result.config.colocate) == (None, None)
    assert len(result.notices) == 1


def test_what_is_said_here_goes_before_old_flags() -> None:
    result = rlhf("--num_infer_workers", "8", "--rollout_workers", "2")
    assert (result.config.rollout_workers, result.config.colocate) == (2, None)
    assert "--num_infer_workers 8 does nothing: --rollout_workers is given." in result.notices


@pytest.mark.parametrize("words", [["0"], ["x"], ["1", "2"], []])
def test_a_number_of_engines_that_is_none(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="num_infer_workers"):
        rlhf("--num_infer_workers", *words, "--vllm_device", "cuda:0")


def test_gc_collect_says_that_it_does_nothing() -> None:
    (notice,) = rlhf("--gc_collect_after_offload", "true").notices
    assert notice.startswith("--gc_collect_after_offload true does nothing: collecting by hand clashed")


def test_an_external_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="contacts no server"):
        rlhf("--vllm_server_host", "10.0.0.1")
