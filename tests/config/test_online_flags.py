"""Flags of online RL that mean nothing beside others say so; none is taken in silence."""

from pathlib import Path

import pytest

from raytune_rl.algorithms.correction import RolloutCorrection
from raytune_rl.config import RLHFConfig, resolved
from raytune_rl.config.parser import parse
from raytune_rl.errors import ConfigError
from raytune_rl.pipelines.online_algorithms import algorithm_of

BASE = ["--model", "m", "--dataset", "d", "--reward_funcs", "accuracy", "--num_generations", "2"]


def notices(*argv: str) -> str:
    return "\n".join(parse([*BASE, *argv], RLHFConfig, environ={}).notices)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "--rlhf_type dapo",
            "is grpo with --loss_type dapo --epsilon_high 0.28 --beta 0.0 --dynamic_sample true",
        ),
        ("--tau_pos 2", "--tau_pos does nothing: --loss_type grpo does not read it, as sapo would"),
        (
            "--loss_type sapo --epsilon 0.1 --delta 3",
            "--epsilon, --delta do nothing: --loss_type sapo does not",
        ),
        (
            "--loss_type cispo --epsilon_high 5 --epsilon 0.1",
            "--epsilon does nothing: --loss_type cispo does not",
        ),
        (
            "--fipo_clip_range 0.1",
            "--fipo_clip_range does nothing: --loss_type grpo does not read it, as fipo would",
        ),
        ("--rollout_importance_sampling_threshold 3", "--rollout_importance_sampling_mode is not given"),
        ("--ref_model_sync_steps 5", "they belong to --sync_ref_model true"),
        ("--teacher_model t --teacher_mixup_alpha 1", "it belongs to --teacher_sync_steps"),
        ("--chord_sft_dataset e", "--chord_sft_dataset does nothing: they belong to --loss_type chord"),
        ("--rlsd_lambda 1", "it belongs to --advantage_estimator rlsd"),
        ("--sdar_loss_coef 1", "--loss_type grpo does not read it, as sdar would"),
        (
            "--advantage_reweight rlsd --teacher_model t",
            "--advantage_reweight is read as --advantage_estimator",
        ),
        (
            "--max_staleness 2 --rollout_in_flight abort",
            "--max_staleness, --rollout_in_flight do nothing: they belong to --async_generate true",
        ),
        (
            "--async_generate true --max_staleness 0 --rollout_in_flight drain",
            "--rollout_in_flight does nothing: nothing is in flight",
        ),
        ("--async_generate true --max_staleness 0", "is the synchronous loop: nothing may be older"),
        (
            "--async_generate true --rollout_importance_sampling_mode none",
            "up to 1 weight version(s) old are trained on as if the present policy had sampled them",
        ),
        ("--async_generate true --max_logp_gap 0.1", "only steps whose completions are all of the newest"),
        (
            "--rollout_importance_sampling_mode none --rollout_importance_sampling_min 0.1",
            "--rollout_importance_sampling_min does nothing: --rollout_importance_sampling_mode is none",
        ),
        ("--max_resample_times 5", "it belongs to --dynamic_sample true"),
        ("--beta 0 --kl_in_reward true", "--kl_in_reward does nothing: with --beta 0"),
        ("--beta 0 --ref_model r --ref_adapters a", "--ref_model, --ref_adapters do nothing: with --beta 0"),
        ("--cosine_max_len 5 --soft_cache_length 3", "they belong to --reward_funcs cosine"),
        ("--log_rollout_offpolicy_metrics true", "rollout_correction/* is measured on every step"),
        (
            "--top_p 0.9 --repetition_penalty 1.1",
            "--top_p 0.9, --repetition_penalty 1.1: completions are sampled",
        ),
        (
            "--eval_temperature 0 --split_dataset_ratio 0.1",
            "2 completions of a held-out prompt will all be the",
        ),
        ("--lora_dropout 0.1", "--lora_dropout 0.1: the policy trains under dropout"),
        ("--eval_temperature 0", "--eval_temperature does nothing: there is no validation data"),
        ('--loss_args {"a":1}', "--loss_args does nothing: --loss_type grpo has flags of its own"),
        ('--advantage_args {"a":1}', "--advantage_args does nothing: --advantage_estimator grpo has flags"),
    ],
)
def test_what_does_nothing_is_said(argv: str, said: str) -> None:
    assert said in notices(*argv.split())


def test_an_adapter_trains_without_dropout_unless_told() -> None:
    assert parse(BASE, RLHFConfig, environ={}).config.lora_dropout == 0.0
    assert parse([*BASE, "--lora_dropout", "0.1"], RLHFConfig, environ={}).config.lora_dropout == 0.1


def test_nothing_is_said_where_all_acts() -> None:
    assert notices("--loss_type", "sapo", "--tau_pos", "2", "--dynamic_sample", "true") == ""
    assert notices("--async_generate", "true", "--rollout_importance_sampling_threshold", "5") == ""
    assert notices("--scale_rewards", "none", "--kl_in_reward", "true", "--kl_estimator", "k2") == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--reward_funcs soft_overlong", "soft_overlong needs --soft_cache_length"),
        ('--vllm_engine_kwargs {"max_num_seqs":4}', "max_num_seqs \\(--vllm_max_num_seqs\\)"),
        ("--loss_type rael", "--loss_type rael is not one of"),
        (
            "--loss_type real --top_entropy_quantile 0.5",
            "real is a loss of whole groups and cannot leave out",
        ),
        ("--loss_type maxrl", "maxrl is a credit: --advantage_estimator maxrl"),
        ("--advantage_estimator real", "real is a loss: --loss_type real"),
        ("--async_generate true --max_staleness -1", "--max_staleness: '-1' must be at least 0"),
        ("--async_generate true --rollout_in_flight wait", "--rollout_in_flight"),
        (
            "--rlhf_type gkd --teacher_model t --lmbda 0.5 --async_generate true",
            "--async_generate true is for",
        ),
        ("--loss_type gspo", "GSPO is --loss_type grpo --importance_sampling_level sequence"),
        ("--rlhf_type dapo --loss_type cispo", "cispo needs --epsilon_high"),
        ("--router_aux_loss_coef 0.1 --prefix_sharing true", "which --prefix_sharing true does not"),
        ("--loss_type clip_cov --clip_cov_low 9", "clip_cov_low 9 is not below clip_cov_high 5"),
        ("--advantage_estimator distill", "needs somebody to learn from"),
        ("--teacher_model a b --teacher_adapters c", "belong to one teacher"),
        ("--teacher_model a b --teacher_weights 1", "1 values for 2"),
        ("--teacher_model a --teacher_column whose", "there are not several teachers"),
        ("--sync_ref_model true", "with LoRA it is the model without adapter"),
        ("--sync_ref_model true --train_type full --beta 0", "there is none with --beta 0"),
        ("--sync_ref_model true --train_type full --ref_adapters a", "mixes whole weights"),
        ("--chord_mu 0.5", "is a flag of ms-swift that is not built yet"),
        ("--teacher_model a b --teacher_sync_steps 1", "moves one teacher, the policy as it was, but"),
        ("--teacher_model a --teacher_sync_steps 1 --teacher_quant_bits 4", "mixes whole weights, which"),
        ("--teacher_model a --teacher_sync_steps 1", "--train_type lora trains an adapter"),
        ("--teacher_adapters a --teacher_backend vllm", "merge --teacher_adapters into theirs first"),
        ("--teacher_model a --teacher_quant_bits 4 --teacher_backend vllm", "vllm does not quantise"),
        ("--teacher_model a --teacher_sync_steps 1 --teacher_backend vllm", "moves weights that"),
        ("--teacher_model a --gpus_per_teacher_worker 0.5 --teacher_backend vllm", "takes whole GPUs"),
    ],
)
def test_what_cannot_be_is_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        notices(*argv.split())


def test_stale_completions_are_corrected_for_unless_told() -> None:
    def mode(*argv: str) -> str | None:
        return resolved.rollout_correction(parse([*BASE, *argv], RLHFConfig, environ={}).config)

    asked = "--rollout_importance_sampling_mode"
    assert mode() is None
    assert mode("--async_generate", "true") == "token_truncate"
    assert mode("--async_generate", "true", "--max_staleness", "0") is None
    assert mode("--async_generate", "true", asked, "sequence_mask") == "sequence_mask"
    assert mode("--async_generate", "true", asked, "none") is None
    algorithm = algorithm_of(parse([*BASE, "--async_generate", "true"], RLHFConfig, environ={}).config)
    assert "rollout_logprobs" in algorithm.needs
    assert algorithm.loss.settings["correction"] == RolloutCorrection("token_truncate", 2.0)


def elastic(*argv: str):
    return parse([*BASE, "--colocate", "false", *argv], RLHFConfig, environ={}).config


@pytest.mark.parametrize(
    ("written", "kept", "bounds"),
    [("4", 4, (4, 4)), ("1:8", "1:8", (1, 8)), ("3:3", 3, (3, 3)), ("02:10", "2:10", (2, 10))],
)
def test_a_number_of_engines_or_their_least_and_most(
    written: str, kept: int | str, bounds: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(f"rollout_workers: {written}\n")
    from_file = parse([str(tmp_path / "run.yaml"), *BASE], RLHFConfig, environ={}).config
    for config in (elastic("--rollout_workers", written), from_file):
        assert config.rollout_workers == kept
        assert resolved.engines(config) == bounds
        assert resolved.elastic(config) is (bounds[0] < bounds[1])
        assert RLHFConfig(**config.args()).rollout_workers == kept, "args.json is read again on resume"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--rollout_workers 0", "0: there must be one engine at least"),
        ("--rollout_workers 0:4", "0:4: there must be one engine at least"),
        ("--rollout_workers 8:1", "8:1: the least comes first, the most behind it: 1:8"),
        ("--rollout_workers -1", "'-1' is neither a number of engines"),
        ("--rollout_workers 1:", "'1:' is neither a number of engines"),
        ("--rollout_workers many", "'many' is neither a number of engines"),
        ("--rollout_workers 1.5", "'1.5' is neither a number of engines"),
        ("--rollout_workers 1:8 --rollout_workers_per_node 2", "which Ray places one by one"),
        ("--rollout_grow_after 5", "add --rollout_workers min:max"),
        ("--rollout_workers 2 --rollout_shrink_after 5", "add --rollout_workers min:max"),
        ("--rollout_workers 1:2 --rollout_shrink_after 0", "must be greater than 0"),
    ],
)
def test_engines_that_cannot_be(argv: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        elastic(*argv.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shared", [["--colocate", "true"], ["--vllm_mode", "colocate"]])
def test_engines_that_come_and_go_have_their_own_gpus(shared: list[str]) -> None:
    with pytest.raises(ConfigError, match="do not come and go: give them GPUs of their own with --colocate"):
        parse([*BASE, "--rollout_workers", "1:8", *shared], RLHFConfig, environ={})


def test_patience_with_engines_has_defaults() -> None:
    config = elastic("--rollout_workers", "1:8")
    assert (resolved.rollout_grow_after(config), resolved.rollout_shrink_after(config)) == (30.0, 300.0)
    more = ["--rollout_grow_after", "0", "--rollout_shrink_after", "60"]
    config = elastic("--rollout_workers", "1:8", *more)
    assert (resolved.rollout_grow_after(config), resolved.rollout_shrink_after(config)) == (0.0, 60.0)
