"""Command line, config file and environment."""

from pathlib import Path
from typing import Any

import pytest

from raytune_rl.config import ExportConfig, RLHFConfig, SFTConfig
from raytune_rl.config.parser import Parsed, parse
from raytune_rl.errors import ConfigError

BASE = ["--model", "m", "--dataset", "d"]
BASE_RL = [*BASE, "--reward_funcs", "accuracy"]


def sft(*argv: str, **more: Any) -> Parsed[SFTConfig]:
    return parse([*BASE, *argv], SFTConfig, environ=more.pop("environ", {}), **more)


def rlhf(*argv: str, environ: dict[str, str] | None = None) -> Parsed[RLHFConfig]:
    return parse([*BASE_RL, *argv], RLHFConfig, environ={} if environ is None else environ)


def from_file(
    tmp_path: Path, text: str, *argv: str, name: str = "run.yaml", **more: Any
) -> Parsed[SFTConfig]:
    file = tmp_path / name
    file.write_text(text)
    return parse([str(file), *argv], SFTConfig, environ=more.pop("environ", {}), **more)


def test_spellings_of_a_flag() -> None:
    for argv in (["--lora_rank", "16"], ["--lora_rank=16"], ["--lora-rank", "16"], ["--lora-rank=16"]):
        assert sft(*argv).config.lora_rank == 16


@pytest.mark.parametrize(
    ("words", "value"),
    [([], True), (["true"], True), (["True"], True), (["false"], False), (["False"], False)],
)
def test_booleans_with_or_without_a_word(words: list[str], value: bool) -> None:
    assert sft("--use_rslora", *words, "--seed", "1").config.use_rslora is value


def test_lists_mappings_numbers_and_choices() -> None:
    config = rlhf(
        "--dataset", "a", "b#100", "--columns", '{"q": "query"}', "--reward_funcs", "accuracy", "format",
        "--reward_weights", "1", "0.5", "--sleep_level", "2", "--learning_rate", "1e-6", "--top_k", "-1",
        "--quant_bits", "4", "--quant_method", "bnb",
    ).config  # fmt: skip
    assert config.dataset == ("a", "b#100")
    assert config.columns == {"q": "query"}
    assert config.reward_weights == (1.0, 0.5)
    assert (config.sleep_level, config.learning_rate, config.top_k, config.quant_bits) == (2, 1e-6, -1, 4)


def test_values_that_look_odd_are_kept() -> None:
    assert sft("--system", "- be brief").config.system == "- be brief"
    assert sft("--system=--really").config.system == "--really"
    assert sft("--system", "a=b").config.system == "a=b"
    assert sft("--system", "").config.system == ""
    assert sft("--system", "none").config.system == "none"


def test_none_takes_back_what_a_file_sets(tmp_path: Path) -> None:
    text = "model: m\ndataset: d\nmax_length: 100\n"
    assert from_file(tmp_path, text).config.max_length == 100
    assert from_file(tmp_path, text, "--max_length", "none").config.max_length is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "Unknown flag --lerning_rate. Did you mean --learning_rate"),
        (["--learning", "1"], "Unknown flag --learning"),
        (["--tuner_typ", "lora"], "--tuner_type"),
        (["--zzzzzz"], "Unknown flag --zzzzzz."),
        (["--num_generations", "4"], "--num_generations is no flag of raytune-rl sft, but of rlhf"),
        (["--num_infer_workers", "4"], "--num_infer_workers is no flag of raytune-rl sft, but of rlhf"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha is a flag of ms-swift that is not built"),
        (["--seed"], "--seed needs a value (int)"),
        (["--system", "You", "are"], "--system takes one value, but 2 follow it: 'You' 'are'"),
        (["--use_rslora", "maybe"], "--use_rslora: 'maybe' is neither true nor false"),
        (["--seed", "1.5"], "--seed: '1.5' is not a whole number"),
        (["--columns", "x"], "--columns: 'x' is not JSON"),
        (["--adapters", "a", " "], "ends in a lone blank after --adapters"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        sft(*argv)
    assert message in str(wrong.value)


def test_a_word_in_front_that_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="'run' belongs to no flag"):
        parse(["run", *BASE], SFTConfig, environ={})


def test_all_unknown_flags_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as wrong:
        sft("--aaa", "--bbb")
    assert "--aaa" in str(wrong.value)
    assert "--bbb" in str(wrong.value)


def test_the_last_duplicate_wins_and_is_told_once() -> None:
    result = sft("--seed", "1", "--seed", "2", "--seed", "3")
    assert result.config.seed == 3
    assert result.notices == ("--seed is given more than once: the last one, 3, counts.",)


def test_a_secret_is_not_told() -> None:
    argv = ["--adapters", "a", "--push_to_hub", "--hub_model_id", "me/it"]
    result = parse([*argv, "--hub_token", "hf_one", "--hub_token", "hf_two"], ExportConfig, environ={})
    assert result.config.hub_token is not None
    assert result.config.hub_token.get_secret_value() == "hf_two"
    assert "hf_" not in str(result)
    for wrong_argv in (["--hub_token", "hf_one", "hf_two"], ["--hub_tokn", "hf_one"], ["--hub_tokn=hf_one"]):
        with pytest.raises(ConfigError) as wrong:
            parse([*argv, *wrong_argv], ExportConfig, environ={})
        assert "hf_" not in str(wrong.value)


def test_a_file_and_flags_over_it(tmp_path: Path) -> None:
    text = "model: m\ndataset: [a, b]\nlearning_rate: 1e-5\nuse_rslora: true\n"
    text += "columns: {q: query}\nlora-rank: 4\n"
    result = from_file(tmp_path, text, "--lora_rank", "16")
    config = result.config
    assert (config.dataset, config.learning_rate, config.use_rslora) == (("a", "b"), 1e-5, True)
    assert config.columns == {"q": "query"}
    assert config.lora_rank == 16
    assert result.config_file == tmp_path / "run.yaml"
    assert result.notices == ()


def test_a_json_file(tmp_path: Path) -> None:
    config = from_file(tmp_path, '{"model": "m", "dataset": "d", "seed": 7}', name="run.json").config
    assert config.seed == 7


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\nlerning_rate: 1\n", ["run.yaml: Unknown flag --lerning_rate", "learning_rate?"]),
        ("model: m\ndataset: d\nlora_rank: eight\n", ["--lora_rank: 'eight'", "run.yaml sets lora_rank"]),
        (
            "model: m\ndataset: d\nwarmup_ratio: 0.1\nwarmup_steps: 2\n",
            ["run.yaml sets warmup_ratio, warmup_steps"],
        ),
        ("- a\n- b\n", ["run.yaml: expected flags with their values, found list"]),
        ("a: [", ["run.yaml, line 1, column 5: not YAML"]),
        ("model: m\n? [a, b]\n: 1\n", ["run.yaml, line 2: a key must be a name"]),
        ("model: m\nseed: 1\nseed: 2\n", ["line 3: 'seed' is there twice"]),
        ("ENV: 3\n", ["ENV must map"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as wrong:
        from_file(tmp_path, text)
    for part in parts:
        assert part in str(wrong.value)


def test_mistakes_in_a_json_file(tmp_path: Path) -> None:
    for text, part in (("{", "not JSON"), ('{"seed": 1, "seed": 2}', "'seed' is there twice")):
        with pytest.raises(ConfigError, match=part):
            from_file(tmp_path, text, name="run.json")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: m\nsystem: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not text in UTF-8 \(byte 20\)"):
        parse([str(tmp_path / "run.yaml")], SFTConfig, environ={})


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        parse(["nowhere.yaml"], SFTConfig, environ={})


def test_env_of_a_file_sets_what_is_not_set(tmp_path: Path) -> None:
    environ = {"A": "shell"}
    text = "model: m\ndataset: d\nENV:\n  A: file\n  B: true\n  NPROC_PER_NODE: 2\n"
    result = from_file(tmp_path, text, environ=environ)
    assert environ == {"A": "shell", "B": "true", "NPROC_PER_NODE": "2"}
    assert result.config.policy_workers == 2
    assert any("ENV.A does nothing" in n for n in result.notices)


def test_defaults_of_a_program_yield_to_file_and_flags(tmp_path: Path) -> None:
    defaults = {"model": "mine", "dataset": "d", "seed": 1, "lora_rank": 2, "max_steps": 3}
    result = from_file(tmp_path, "seed: 10\nlora_rank: 20\n", "--lora_rank", "200", defaults=defaults)
    config = result.config
    assert (config.model, config.max_steps, config.seed, config.lora_rank) == ("mine", 3, 10, 200)


def test_number_of_processes() -> None:
    assert rlhf(environ={"NPROC_PER_NODE": "8"}).config.policy_workers == 8
    two = rlhf(environ={"NPROC_PER_NODE": "8", "NNODES": "2"})
    assert (two.config.policy_workers, two.config.policy_workers_per_node) == (16, 8)
    assert two.notices == (
        "NPROC_PER_NODE=8 NNODES=2 is read as --policy_workers 16 --policy_workers_per_node 8.",
    )
    several = sft(environ={"NNODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert several.notices == ("NNODES=2 is read as --policy_workers 2 --policy_workers_per_node 1.",)
    each = rlhf("--policy_workers_per_node", "4", environ={"NPROC_PER_NODE": "8"})
    assert (each.config.policy_workers, each.config.policy_workers_per_node) == (None, 4)
    assert each.notices == ("NPROC_PER_NODE=8 does nothing: --policy_workers_per_node 4 is given.",)
    several = sft(environ={"NNODES": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert several.config.policy_workers == 2
    assert several.notices == ("NNODES=2 is read as --policy_workers 2 --policy_workers_per_node 1.",)
    assert sft(environ={"CUDA_VISIBLE_DEVICES": "0,1,2"}).config.policy_workers == 3
    assert rlhf(environ={"CUDA_VISIBLE_DEVICES": "0,1"}).config.policy_workers is None
    both = rlhf(
        "--policy_workers", "4", "--per_device_train_batch_size", "2", environ={"NPROC_PER_NODE": "8"}
    )
    assert both.config.policy_workers == 4
    assert "NPROC_PER_NODE=8 does nothing: --policy_workers 4 is given." in both.notices
    with pytest.raises(ConfigError, match="NPROC_PER_NODE: 'gpu'"):
        rlhf(environ={"NPROC_PER_NODE": "gpu"})
    with pytest.raises(ConfigError, match="NODE_RANK=1: start the command once"):
        rlhf(environ={"NPROC_PER_NODE": "8", "NNODES": "2", "NODE_RANK": "1"})


def test_use_hf_of_the_environment() -> None:
    assert sft(environ={"USE_HF": "1"}).config.use_hf
    assert not sft("--use_hf", "false", environ={"USE_HF": "1"}).config.use_hf
    assert not sft(environ={"USE_HF": "0"}).config.use_hf


def test_image_settings_of_the_environment_give_way_to_flags() -> None:
    found = sft(environ={"MAX_PIXELS": "1003520", "ROOT_IMAGE_DIR": "/data"})
    assert (found.config.max_pixels, found.config.root_image_dir) == (1003520, "/data")
    assert found.notices == (
        "MAX_PIXELS=1003520 is read as --max_pixels 1003520.",
        "ROOT_IMAGE_DIR=/data is read as --root_image_dir /data.",
    )
    both = sft("--max_pixels", "5000", environ={"MAX_PIXELS": "1003520"})
    assert both.config.max_pixels == 5000
    assert both.notices == ("MAX_PIXELS=1003520 does nothing: --max_pixels 5000 is given.",)
    assert sft("--max_pixels", "5000", environ={"MAX_PIXELS": "5000"}).notices == ()
    films = sft(environ={"FPS": "0.5", "FPS_MAX_FRAMES": "16", "VIDEO_MAX_PIXELS": "50176"}).config
    assert (films.fps, films.fps_max_frames, films.video_max_pixels) == (0.5, 16, 50176)
    swift = sft("--model_kwargs", '{"fps_max_frames": 12, "fps": 1}')
    assert (swift.config.fps, swift.config.fps_max_frames) == (1.0, 12)
    assert swift.notices == ("--model_kwargs is read as --fps_max_frames 12 --fps 1.",)
    for words, said in (
        (['{"crop": 1}'], "crop is not built here, only max_pixels"),
        (["fps=1"], "takes an object in JSON"),
        (['{"fps": 1}', "--fps", "2"], "says fps 1, but --fps 2 is given"),
    ):
        with pytest.raises(ConfigError, match=said):
            sft("--model_kwargs", *words)
    with pytest.raises(ConfigError, match="FPS: 'fast' is not a number above 0"):
        sft(environ={"FPS": "fast"})
    with pytest.raises(ConfigError, match="MAX_PIXELS: 'many' is not a whole number"):
        sft(environ={"MAX_PIXELS": "many"})


EVALUATED = ["--val_dataset", "v", "--num_generations_eval", "1"]


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--eval_steps", "5"], "--eval_steps does nothing: there is no validation data"),
        (["--per_device_eval_batch_size", "4"], "held-out rows are evaluated together"),
        (["--train_type", "full", "--lora_rank", "4"], "--lora_rank does nothing"),
        (["--max_steps", "4", "--num_train_epochs", "1"], "--num_train_epochs does nothing"),
        (["--lr_scheduler_type", "constant", "--warmup_steps", "3"], "--warmup_steps does nothing"),
        (["--target_regex", "a", "--target_modules", "b"], "--target_modules does nothing"),
        (
            ["--save_steps", "3", "--eval_steps", "2", *EVALUATED],
            "only checkpoints of steps that both divide",
        ),
        (
            ["--save_strategy", "epoch", "--save_steps", "3"],
            "--save_steps does nothing: --save_strategy is epoch",
        ),
        (["--eval_strategy", "epoch"], "--eval_strategy does nothing: there is no validation data"),
        (
            ["--eval_strategy", "epoch", "--eval_steps", "2", *EVALUATED],
            "--eval_steps does nothing: --eval_strategy is epoch",
        ),
        (
            ["--save_strategy", "epoch", "--eval_steps", "2", *EVALUATED],
            "--eval_steps does nothing: --eval_strategy follows --save_strategy",
        ),
        (
            ["--save_strategy", "epoch", "--eval_strategy", "steps", *EVALUATED],
            "only checkpoints of steps at which both fall together",
        ),
        (["--vllm_mode", "server"], "--vllm_mode server is read as --colocate false"),
        (["--colocate", "false", "--sleep_level", "1"], "--sleep_level does nothing"),
        (["--beta", "0", "--reference_workers", "2"], "--reference_workers does nothing"),
    ],
)
def test_what_cannot_act_is_told(argv: list[str], part: str) -> None:
    assert len([n for n in rlhf(*argv).notices if part in n]) == 1
    assert rlhf().notices == ()


def test_what_acts_at_the_end_of_an_epoch_is_told_of_nothing() -> None:
    both = ["--save_strategy", "epoch", "--eval_strategy", "epoch", "--save_total_limit", "2", *EVALUATED]
    # Evaluation every so many steps: as many as between checkpoints, were those written by steps.
    steps = ["--save_strategy", "epoch", "--eval_strategy", "steps", "--save_steps", "3", *EVALUATED]
    assert rlhf(*both).notices == rlhf("--save_strategy", "steps", "--save_steps", "3").notices == ()
    assert "does nothing" not in "".join(rlhf(*steps).notices)


@pytest.mark.parametrize("word", ["no", "none", "false", "False"])
def test_nothing_is_saved_or_evaluated_where_the_user_says_so(word: str) -> None:
    told = rlhf("--save_strategy", word, "--eval_strategy", word)
    assert (told.config.save_strategy, told.config.eval_strategy, told.notices) == ("no", "no", ())
    (notice,) = rlhf("--eval_strategy", word, *EVALUATED).notices
    assert notice.startswith("--eval_strategy is no: the validation data is never evaluated on")
    (notice,) = rlhf("--save_strategy", word, "--save_steps", "3").notices
    assert notice.startswith("--save_steps does nothing: --save_strategy is no")


def test_yaml_reads_no_as_false(tmp_path: Path) -> None:
    said = "model: m\ndataset: d\nsave_strategy: no\neval_strategy: no\n"
    config = from_file(tmp_path, said).config
    assert (config.save_strategy, config.eval_strategy) == ("no", "no")


def test_help_names_every_flag_once_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    for config_class in (SFTConfig, RLHFConfig, ExportConfig):
        with pytest.raises(SystemExit) as done:
            parse(["--help"], config_class)
        assert done.value.code == 0
        text = capsys.readouterr().out
        names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
        assert names == list(dict.fromkeys(names))
        assert {name.removeprefix("--") for name in names} == set(config_class.model_fields)
    assert "merge" in text
    with pytest.raises(SystemExit):
        parse(["-h"], RLHFConfig)
    text = " ".join(capsys.readouterr().out.split())
    assert "--temperature float Sampling temperature." in text
    assert "at the same temperature. [0.9]" in text
