"""Notices on settings that will have no effect. Nobody shall find that out by himself."""

from __future__ import annotations

from collections.abc import Iterable

from raytune_rl.algorithms.credit.base import is_built_in_credit
from raytune_rl.config import deepspeed, resolved
from raytune_rl.config.algorithms import credit_flags, loss_flags
from raytune_rl.config.base import Options
from raytune_rl.config.commands import PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.preference import unread
from raytune_rl.config.recipes import RECIPES, recipe_in_words

_REWARD_FLAGS = {
    "cosine": (
        "cosine_min_len_value_correct", "cosine_max_len_value_correct", "cosine_min_len_value_wrong",
        "cosine_max_len_value_wrong", "cosine_max_len",
    ),
    "repetition": ("repetition_n_grams", "repetition_max_penalty"),
    "soft_overlong": ("soft_max_length", "soft_cache_length"),
}  # fmt: skip


def notices_for(config: Options) -> tuple[str, ...]:
    """One line per setting, or group of settings, that will have no effect in this config."""
    notices: list[str] = []
    if isinstance(config, (SFTConfig, PreferenceConfig, RLHFConfig)):
        notices += _training(config)
    if isinstance(config, PreferenceConfig):
        notices += _preference(config)
    if isinstance(config, RLHFConfig):
        notices += _online(config)
    return tuple(notices)


def _training(config: SFTConfig | PreferenceConfig | RLHFConfig) -> Iterable[str]:
    why = "held-out rows are evaluated together, --max_tokens_per_micro_batch tokens at a time"
    yield from _idle(config, ("per_device_eval_batch_size",), why)
    if not resolved.has_validation(config):
        names = ["eval_steps", "num_generations_eval", "eval_temperature"]
        if config.eval_strategy != "no":
            names.insert(0, "eval_strategy")
        why = "there is no validation data (--val_dataset or --split_dataset_ratio)"
        yield from _idle(config, names, why)
    yield from _when(config)
    if config.train_type == "full":
        lora = (
            "lora_rank", "lora_alpha", "lora_dropout", "target_modules", "target_regex", "target_parameters",
            "modules_to_save",
        )  # fmt: skip
        yield from _idle(config, lora, "--train_type full trains every weight, without LoRA")
    elif config.target_regex is not None:
        yield from _idle(config, ("target_modules",), "--target_regex goes first")
    if config.ONLINE or config.streams:
        stored = ("load_from_cache_file", "dataset_cache_dir")
        yield from _idle(config, stored, "neither prompts nor streams are kept on disk")
    if config.SUPERVISED and not config.streams:
        yield from _idle(config, ("shuffle_buffer_size",), "it is for --streaming true")
    if config.max_steps > 0:
        yield from _idle(config, ("num_train_epochs",), "--max_steps goes first")
    if config.lr_scheduler_type == "constant":
        why = "--lr_scheduler_type constant has no warm-up; constant_with_warmup has"
        yield from _idle(config, [n for n in ("warmup_ratio", "warmup_steps") if getattr(config, n)], why)
    if unused := deepspeed.unused(config.deepspeed):
        yield (
            f"--deepspeed: {' and '.join(unused)} of the configuration {'do' if unused[1:] else 'does'} "
            "nothing: AdamW and its schedule follow --learning_rate, --lr_scheduler_type and their like."
        )


def _when(config: SFTConfig | PreferenceConfig | RLHFConfig) -> Iterable[str]:
    """Of when to save and when to evaluate."""
    evaluates, save = resolved.evaluates(config), config.save_strategy
    evaluation = resolved.eval_strategy(config)
    reason = "--eval_strategy is" if config.eval_strategy else "--eval_strategy follows --save_strategy"
    if evaluation == "no" and resolved.has_validation(config):
        yield f"{reason} no: the validation data is never evaluated on (--eval_strategy steps does)."
    if evaluates and evaluation == "epoch":
        yield from _idle(config, ("eval_steps",), f"{reason} epoch")
    elif evaluation == "no" and resolved.has_validation(config):
        yield from _idle(config, ("eval_steps",), f"{reason} no")
    by_save_steps = evaluates and evaluation == "steps" and config.eval_steps is None
    if save != "steps" and not by_save_steps:
        yield from _idle(config, ("save_steps",), f"--save_strategy is {save}")
    if save == "no":
        yield from _idle(config, ("save_total_limit", "save_only_model"), "--save_strategy is no")
    if not evaluates or save == "no" or save == evaluation == "epoch":
        return
    if save != evaluation:
        yield (
            f"--save_strategy {save} and --eval_strategy {evaluation}: only checkpoints of steps at which "
            "both fall together are evaluated and can be the best one."
        )
    elif config.save_steps % resolved.eval_steps(config):
        yield (
            f"--save_steps {config.save_steps} and --eval_steps {resolved.eval_steps(config)}: only "
            "checkpoints of steps that both divide are evaluated and can be the best one."
        )


def _preference(config: PreferenceConfig) -> Iterable[str]:
    # A loss of a plugin is named by --loss_type, whatever the algorithm whose rows it takes.
    taken = {"loss_type"} if config.external_plugins else set()
    idle = [name for name in unread(config.rlhf_type) if name not in taken]
    yield from _idle(config, idle, f"no part of --rlhf_type {config.rlhf_type}")
    if not config.external_plugins:
        yield from _idle(config, ("loss_args",), "it is for a loss of --external_plugins")
    if config.rlhf_type == "rm":
        yield from _idle(config, ("prefix_sharing",), "a reward model reads each side of a pair as a whole")
    kinds = config.loss_type
    alpha = config.f_divergence_type == "alpha_divergence"
    for kind, used, name, owner in (
        ("dpo", "discopop" in kinds, "discopop_tau", "--loss_type discopop"),
        ("dpo", "bco_pair" in kinds, "bco_shift", "--loss_type bco_pair"),
        ("dpo", alpha, "f_alpha_divergence_coef", "--f_divergence_type alpha_divergence"),
        ("cpo", "simpo" in kinds, "simpo_gamma", "--loss_type simpo"),
    ):
        if config.rlhf_type == kind and not used:
            yield from _idle(config, (name,), f"it belongs to {owner}")
    if not config.own_reference:
        names = ("reference_workers", "gpus_per_reference_worker", "cpus_per_reference_worker")
        yield from _idle(config, names, "there is no reference model of its own (--ref_model)")


def _online(config: RLHFConfig) -> Iterable[str]:
    if config.vllm_mode == "server":
        yield (
            "--vllm_mode server is read as --colocate false: rollout workers on GPUs of their own, started "
            "by this "
            "command; no server is contacted."
        )
    if resolved.colocate(config) is False:
        names = ("sleep_level", "offload_model", "offload_optimizer")
        used = tuple(name for name in names if getattr(config, name))
        yield from _idle(config, used, "rollout workers have GPUs of their own")
    cut = [
        f"--{name} {getattr(config, name):g}"
        for name, neutral in (("top_p", 1), ("top_k", -1), ("min_p", 0), ("repetition_penalty", 1))
        if getattr(config, name) != neutral
    ]
    if cut:
        yield (
            f"{', '.join(cut)}: completions are sampled from a changed distribution, but the loss takes the "
            "log-probs of the whole one; rollout_correction/* shows the difference."
        )
    if config.lora_dropout > 0 and config.train_type == "lora":
        yield (
            f"--lora_dropout {config.lora_dropout:g}: the policy trains under dropout, the engine samples "
            "without; rollout_correction/* shows the difference."
        )
    if config.eval_temperature == 0 and resolved.num_generations_eval(config) > 1:
        yield (
            f"--eval_temperature 0: the {resolved.num_generations_eval(config)} completions of a held-out "
            "prompt will all be the same; --num_generations_eval 1 saves their time."
        )
    if config.rlhf_type == "gkd":
        yield f"--rlhf_type gkd is distillation: {recipe_in_words('gkd')}, where you did not say otherwise."
        if config.is_set("jsd_beta") and config.beta == 0:
            jsd_beta = config.args()["jsd_beta"]  # a flag that the loss declares
            yield f"the divergence from the teacher has --jsd_beta {jsd_beta:g} (ms-swift's --beta)."
    elif config.rlhf_type in RECIPES:
        yield (
            f"--rlhf_type {config.rlhf_type} is grpo with {recipe_in_words(config.rlhf_type)}, where you did "
            "not say otherwise; the reward soft_overlong belongs to it too, but is your choice."
        )
    if config.beta == 0:
        without = (
            "reference_workers", "gpus_per_reference_worker", "cpus_per_reference_worker",
            "kl_in_reward", "kl_estimator", "ref_model", "ref_adapters",
        )  # fmt: skip
        yield from _idle(config, without, "with --beta 0 there is no reference model")
    if not config.has_teachers:
        own = [name for name in type(config).model_fields if "teacher_" in name]
        own += ["lmbda", "gkd_logits_topk"]
        yield from _idle(config, own, "there is no --teacher_model")
    elif config.teacher_sync_steps is None:
        yield from _idle(config, ("teacher_mixup_alpha",), "it belongs to --teacher_sync_steps")
    if not config.reward_model:
        own = [name for name in type(config).model_fields if "reward_model_" in name]
        yield from _idle(config, own, "there is no --reward_model")
    if config.loss_type != "chord":
        own = ["chord_sft_dataset", "chord_sft_per_device_train_batch_size"]
        yield from _idle(config, own, "they belong to --loss_type chord")
    if not config.reward_funcs:
        own = ["reward_workers", "cpus_per_reward_worker", "reward_timeout", "reward_memory_limit"]
        yield from _idle(config, own, "there are no --reward_funcs")
    if config.weight_delta and config.train_type == "full" and config.torch_dtype == "float32":
        yield "--weight_delta true: a step changes nearly every float32 weight, so they will arrive whole."
    if config.weight_delta and config.train_type == "lora" and config.vllm_enable_lora is not False:
        yield "--weight_delta true is for whole weights: where the adapter travels alone, it does nothing."
    yield from _loss(config)
    yield from _ahead(config)
    if not config.external_plugins:  # whose rewards may read any of these
        for name, flags in _REWARD_FLAGS.items():
            if name not in config.reward_funcs:
                yield from _idle(config, flags, f"they belong to --reward_funcs {name}")


def _ahead(config: RLHFConfig) -> Iterable[str]:
    """Of sampling ahead of the training."""
    if not config.async_generate:
        names = ("max_staleness", "rollout_in_flight")
        yield from _idle(config, names, "they belong to --async_generate true")
        return
    if config.max_staleness == 0:
        yield "--async_generate true with --max_staleness 0 is the synchronous loop: nothing may be older."
        yield from _idle(config, ("rollout_in_flight",), "nothing is in flight when weights arrive")
        return
    if config.rollout_importance_sampling_mode == "none" and config.off_policy_sequence_mask_delta is None:
        yield (
            f"--rollout_importance_sampling_mode none: completions up to {config.max_staleness} weight "
            "version(s) old are trained on as if the present policy had sampled them."
        )
    if config.max_logp_gap:
        yield (
            "--max_logp_gap: with --async_generate engines prove themselves at the start and after a loss as "
            "ever, but only steps whose completions are all of the newest weights are looked at."
        )


def _loss(config: RLHFConfig) -> Iterable[str]:
    """Constants of another loss, or of another credit, than the one chosen."""
    settings = loss_flags()
    if any(config.loss_type in owners for owners in settings.values()):
        of_recipe = RECIPES.get(config.rlhf_type, {})
        idle: dict[tuple[str, ...], list[str]] = {}
        for name, owners in settings.items():
            if config.loss_type not in owners and name not in of_recipe and name in type(config).model_fields:
                idle.setdefault(tuple(owners), []).append(name)
        for whose, of_others in idle.items():
            why = f"--loss_type {config.loss_type} does not read it, as {', '.join(whose)} would"
            yield from _idle(config, of_others, why)
        if config.loss_args:
            yield f"--loss_args does nothing: --loss_type {config.loss_type} has flags of its own."
    estimator = config.advantage_estimator
    for name, owners in credit_flags().items():
        if estimator not in owners:
            yield from _idle(config, (name,), f"it belongs to --advantage_estimator {' and '.join(owners)}")
    if config.advantage_args and is_built_in_credit(estimator):
        yield f"--advantage_args does nothing: --advantage_estimator {estimator} has flags of its own."
    if resolved.rollout_correction(config) is None:
        names = ("rollout_importance_sampling_threshold", "rollout_importance_sampling_min")
        mode = config.rollout_importance_sampling_mode
        why = f"--rollout_importance_sampling_mode is {'not given' if mode is None else mode}"
        yield from _idle(config, names, why)
    if not config.sync_ref_model:
        names = ("ref_model_sync_steps", "ref_model_mixup_alpha")
        yield from _idle(config, names, "they belong to --sync_ref_model true")
    if not config.dynamic_sample:
        yield from _idle(config, ("max_resample_times",), "it belongs to --dynamic_sample true")


def _idle(config: Options, names: Iterable[str], why: str) -> Iterable[str]:
    given = [f"--{name}" for name in names if config.is_set(name)]
    if given:
        yield f"{', '.join(given)} {'do' if len(given) > 1 else 'does'} nothing: {why}."
