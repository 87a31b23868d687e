"""DeepSpeed configurations: presets by name, a JSON file, or JSON itself.

The presets have the values of ms-swift's presets of the same names, but a bucket is never larger than what is
trained. `"auto"` marks what the policy worker fills in from the run's own settings (`fill_auto`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from raytune_rl.config.explain import did_you_mean
from raytune_rl.errors import ConfigError

DEFAULT = "zero2"

_COMMON: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
_BUCKETS: dict[str, Any] = {
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": False,
    "reduce_scatter": True,
    "reduce_bucket_size": "auto",  # 2e8, or the model's own size where that is less
    "contiguous_gradients": True,
}
_STAGE3: dict[str, Any] = {
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}


_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_UNUSED = ("optimizer", "scheduler")


def _offload(to_cpu: bool) -> dict[str, Any]:
    return {"device": "cpu" if to_cpu else "none", "pin_memory": True}


def _zero(stage: int, offload: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        zero |= {"offload_optimizer": _offload(offload)} | _BUCKETS
    elif stage == 3:
        zero |= {"offload_optimizer": _offload(offload), "offload_param": _offload(offload)} | _STAGE3
    return {**_COMMON, "zero_optimization": zero}


PRESETS: Mapping[str, dict[str, Any]] = {
    "zero0": _zero(0),
    "zero1": _zero(1),
    "zero2": _zero(2),
    "zero3": _zero(3),
    "zero2_offload": _zero(2, offload=True),
    "zero3_offload": _zero(3, offload=True),
}


def load(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration that a value of `--deepspeed` stands for; `None` is `zero2`. A fresh copy each time.

    Raises:
        ConfigError: no such preset or file, or not a JSON object.
    """
    if value is None:
        value = DEFAULT
    if isinstance(value, Mapping):
        return deepcopy(dict(value))
    if value in PRESETS:
        return deepcopy(PRESETS[value])
    if value.lstrip().startswith("{"):
        return _json_object(value, "--deepspeed")
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--deepspeed: {value!r} is neither a preset ({', '.join(PRESETS)}) nor a JSON file that exists."
            + did_you_mean(value, PRESETS)
        )
    return _json_object(path.read_text(encoding="utf-8"), f"--deepspeed {value}")


def for_engine(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration for DeepSpeed itself: without batch sizes, which are the run's own, and without
    what it does not decide here (`unused`).
    """
    config = load(value)
    return {key: part for key, part in config.items() if key not in (*_BATCH, *_UNUSED)}


def unused(value: str | Mapping[str, Any] | None) -> tuple[str, ...]:
    """Sections that have no effect here: optimizer and schedule are those of the run's flags."""
    return tuple(name for name in _UNUSED if name in load(value))


def check(
    value: str | Mapping[str, Any] | None,
    *,
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int | None,
    max_grad_norm: float,
) -> None:
    """Compares a value of `--deepspeed` with the flags that say the same things.

    Raises:
        ConfigError: No such preset or file, or it says another thing than a flag.
    """
    config = load(value)
    settings = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", per_device_train_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", max_grad_norm),
    }
    for name, (flag, number) in settings.items():
        if config.get(name, "auto") not in ("auto", number):
            other = "is not given" if number is None else f"is {number}"
            raise ConfigError(
                f"--deepspeed: the configuration sets {name} to {config[name]!r}, but --{flag} {other}: give "
                f'--{flag} {config[name]} too, or write "auto" in the configuration.'
            )
    if config.get("zero_optimization", {}).get("compute_grad_norm", True) is False:
        raise ConfigError(
            "--deepspeed: the configuration sets zero_optimization.compute_grad_norm to False, but the "
            "gradient's norm is told on every step: leave it out."
        )
    if config.get("train_batch_size", "auto") != "auto":
        raise ConfigError(
            f"--deepspeed: the configuration sets train_batch_size to {config['train_batch_size']!r}, which "
            "follows from --per_device_train_batch_size, --gradient_accumulation_steps and the number of "
            'workers: write "auto" or leave it out.'
        )


def stage(value: str | Mapping[str, Any] | None) -> int:
    """The ZeRO stage that a value of `--deepspeed` comes to; errors as in `load`."""
    return int(load(value).get("zero_optimization", {}).get("stage", 0))


def fill_auto(
    config: Mapping[str, Any], known: Mapping[str, Any], preferred: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Replaces `"auto"`, and what is missing, by the run's own values.

    Args:
        config: As `load` returns it.
        known: Values by dotted name, such as `{"gradient_clipping": 1.0, "bf16.enabled": True}`.
        preferred: The same, but the configuration may have others.

    Returns:
        A new configuration. An `"auto"` that `known` does not name is left out: DeepSpeed's default holds.

    Raises:
        ConfigError: the configuration has another value than the flags of the run.
    """
    filled = deepcopy(dict(config))
    preferred = preferred or {}
    for name, value in {**preferred, **known}.items():
        *parents, leaf = name.split(".")
        section = filled
        for parent in parents:
            section = section.setdefault(parent, {})
        if section.get(leaf, "auto") == "auto":
            section[leaf] = value
        elif section[leaf] != value and name not in preferred:
            raise ConfigError(
                f"--deepspeed: the configuration sets {name} to {section[leaf]!r}, but this run needs "
                f'{value!r}: make them agree, or write "auto".'
            )
    return _without_auto(filled)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != "auto"
    }


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON: {error}.") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(parsed).__name__}.")
    return parsed
