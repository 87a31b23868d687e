"""Flags of ms-swift that go by another name here, or that it has since removed.

Commands written for any of its versions shall run as they stand; whatever is read in another way than it is
written is told in one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raytune_rl.config.environment import MEDIA_LIMITS, visible_devices, whole_number
from raytune_rl.config.flags import Flag
from raytune_rl.config.not_offered import IDLE, IDLE_ONLY_WITH
from raytune_rl.errors import ConfigError

RENAMED = {
    "tuner_type": "train_type",
    "custom_register_path": "external_plugins",
    "multi_turn_func": "multi_turn_scheduler",
    "advantage_reweight": "advantage_estimator",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "max_model_len": "vllm_max_model_len",
    "response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_num_seqs": "vllm_max_num_seqs",
    "enforce_eager": "vllm_enforce_eager",
    "enable_prefix_caching": "vllm_enable_prefix_caching",
    "limit_mm_per_prompt": "vllm_limit_mm_per_prompt",
}
"""Old name to the name here."""

REMOVED = ("vllm_device", "num_infer_workers")
"""Names without a setting of their own, read by `translate`."""

EXTERNAL_SERVER = (
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_base_url",
    "vllm_server_group_port",
    "vllm_server_timeout",
)


def rename(name: str, flags: Mapping[str, Flag]) -> tuple[str, str | None]:
    """The name here of a flag, and a notice where it differs from the one written."""
    new = RENAMED.get(name)
    if new is None or new not in flags:
        return name, None
    return new, f"--{name} is read as --{new}."


def known(name: str, flags: Mapping[str, Flag]) -> bool:
    """Whether `translate` reads this flag for a command that has these flags."""
    if name in IDLE:
        return IDLE_ONLY_WITH.get(name, "train_type") in flags
    if name == "model_kwargs":
        return "max_pixels" in flags
    return name in REMOVED and "rollout_workers" in flags


def translate(settings: dict[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Replaces removed flags, and values that have changed, by the settings they come to.

    Returns:
        The new settings, and one notice per replacement.
    """
    settings = dict(settings)
    notices = [_idle(name, settings.pop(name)) for name in [n for n in settings if n in IDLE]]
    scale = settings.get("scale_rewards")
    if str(scale).lower() in ("true", "false"):
        settings["scale_rewards"] = "group" if str(scale).lower() == "true" else "none"
        notices.append(f"--scale_rewards {scale} is read as --scale_rewards {settings['scale_rewards']}.")
    if "model_kwargs" in settings:
        notices.append(_media_settings(settings))
    if "vllm_device" in settings or "num_infer_workers" in settings:
        notices.extend(_place_rollout(settings, environ))
    return settings, notices


def _idle(name: str, value: Any) -> str:
    """The notice for a flag whose value says what happens anyway.

    Raises:
        ConfigError: It says something else.
    """
    allowed, why = IDLE[name]
    said = " ".join(_words(value)).lower() or "true"
    if allowed and said not in allowed:
        raise ConfigError(f"--{name} {said} is not built here, only {' or '.join(allowed)}: {why}.")
    return f"--{name} {said} does nothing: {why}."


def _media_settings(settings: dict[str, Any]) -> str:
    """How much of a medium is shown, as ms-swift 4 may be told in one object.

    Raises:
        ConfigError: It is no object, or says something else, or another thing than a flag.
    """
    given = settings.pop("model_kwargs")
    if not isinstance(given, Mapping):
        said = " ".join(_words(given))
        try:
            given = json.loads(said)
        except ValueError:
            given = None
        if not isinstance(given, Mapping):
            raise ConfigError(f'--model_kwargs takes an object in JSON, such as {{"fps": 1}}, not {said!r}.')
    for name, value in given.items():
        if name not in MEDIA_LIMITS:
            raise ConfigError(f"--model_kwargs: {name} is not built here, only {', '.join(MEDIA_LIMITS)}.")
        if str(settings.get(name, value)) != str(value):
            raise ConfigError(f"--model_kwargs says {name} {value}, but --{name} {settings[name]} is given.")
        settings[name] = value
    return f"--model_kwargs is read as {' '.join(f'--{name} {value}' for name, value in given.items())}."


def _place_rollout(settings: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """ms-swift 3.x: which devices the engines get follows from three numbers."""
    devices = _words(settings.pop("vllm_device", ()))
    has_engines = "num_infer_workers" in settings
    engines = _words(settings.pop("num_infer_workers", ()))
    if has_engines and len(engines) != 1:
        raise ConfigError(f"--num_infer_workers takes one value, but {len(engines)} follow it.")
    auto = all(device == "auto" for device in devices)
    what = " ".join(
        ([f"--vllm_device {' '.join(devices)}"] if devices else [])
        + ([f"--num_infer_workers {' '.join(engines)}"] if engines else [])
    )
    given = [name for name in ("rollout_workers", "colocate", "vllm_mode") if settings.get(name) is not None]
    if given:
        return [f"{what} does nothing: {', '.join('--' + name for name in given)} is given."]
    if auto and not engines:
        return [f"{what}: Ray places the rollout workers, which it does without this flag too."]
    count = whole_number("--num_infer_workers", engines[0]) if engines else len(devices)
    policy = settings.get("policy_workers") or environ.get("NPROC_PER_NODE")
    ranks = whole_number("--policy_workers", policy) if policy else None
    apart = _apart(count, ranks, visible_devices(environ)) if auto else _beyond(devices, ranks or 1)
    settings["rollout_workers"] = count
    settings["colocate"] = not apart
    where = "on GPUs of their own" if apart else "on the policy's GPUs"
    chosen = "" if auto else " Ray chooses which."
    return [
        f"{what} is read as --rollout_workers {count} --colocate {str(not apart).lower()}: "
        f"rollout workers {where}.{chosen}"
    ]


def _apart(engines: int, ranks: int | None, visible: int | None) -> bool:
    if visible is not None and (ranks or 1) + engines <= visible:
        return True
    return ranks is not None and engines < ranks


def _beyond(devices: tuple[str, ...], ranks: int) -> bool:
    """Whether no device is one of the first ones, on which the policy trains."""
    numbers = [device.rpartition(":")[2] for device in devices]
    return all(number.isdigit() and int(number) >= ranks for number in numbers)


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(str(item) for item in value)
    return (str(value),)
