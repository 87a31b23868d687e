"""What a config asks for that will have no effect. Nobody shall find that out by himself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from raytune_rl.config import resolved
from raytune_rl.config.base import Options
from raytune_rl.config.commands import PreferenceConfig, RLHFConfig, SFTConfig
from raytune_rl.config.preference import unread

_NO_LOADER = "rows are prepared before training and read from shared memory; no loader is needed"

PENDING: Mapping[str, Mapping[str, str]] = {
    "sft": {
        "dataloader_num_workers": _NO_LOADER,
    },
    "rlhf --rlhf_type dpo": {
        "dataloader_num_workers": _NO_LOADER,
    },
    "rlhf": {
        "dataloader_num_workers": _NO_LOADER,
    },
}
"""Per command, settings that are taken but cannot act yet, and why. Remove a line when its setting acts."""


def notices_for(config: Options) -> tuple[str, ...]:
    """One line per setting, or group of settings, that will have no effect in this config."""
    notices = [
        f"--{name} does nothing: {why}."
        for name, why in PENDING.get(config.COMMAND, {}).items()
        if getattr(config, name) != type(config).model_fields[name].default
    ]
    if isinstance(config, (SFTConfig, PreferenceConfig, RLHFConfig)):
        notices += _training(config)
    if isinstance(config, PreferenceConfig):
        notices += _preference(config)
    if isinstance(config, RLHFConfig):
        notices += _online(config)
    return tuple(notices)


def _training(config: SFTConfig | PreferenceConfig | RLHFConfig) -> Iterable[str]:
    if not resolved.has_validation(config):
        names = ("eval_steps", "per_device_eval_batch_size", "num_generations_eval")
        why = "there is no validation data (--val_dataset or --split_dataset_ratio)"
        yield from _idle(config, names, why)
    if config.train_type == "full":
        lora = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
        yield from _idle(config, lora, "--train_type full trains every weight, without LoRA")
    if config.max_steps > 0:
        yield from _idle(config, ("num_train_epochs",), "--max_steps goes first")


def _preference(config: PreferenceConfig) -> Iterable[str]:
    yield from _idle(config, unread(config.rlhf_type), f"no part of --rlhf_type {config.rlhf_type}")
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
    if config.beta == 0:
        names = ("reference_workers", "gpus_per_reference_worker", "cpus_per_reference_worker")
        yield from _idle(config, names, "with --beta 0 there is no reference model")


def _idle(config: Options, names: Iterable[str], why: str) -> Iterable[str]:
    given = [f"--{name}" for name in names if config.is_set(name)]
    if given:
        yield f"{', '.join(given)} {'do' if len(given) > 1 else 'does'} nothing: {why}."
