"""Environment variables that ms-swift's commands are started with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raytune_rl.config.flags import Flag
from raytune_rl.errors import ConfigError


def apply(
    settings: dict[str, Any], flags: Mapping[str, Flag], environ: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Adds what the environment says to settings that are not given.

    Returns:
        The new settings, and one notice per variable that acts, or that cannot.
    """
    settings = dict(settings)
    notices: list[str] = []
    if "policy_workers" in flags:
        notices += _policy_workers(settings, flags, environ)
    notices += _media(settings, flags, environ)
    if "use_hf" in flags and environ.get("USE_HF", "").lower() in ("1", "true") and "use_hf" not in settings:
        settings["use_hf"] = True
        notices.append(f"USE_HF={environ['USE_HF']} is read as --use_hf true.")
    return settings, notices


def _media(settings: dict[str, Any], flags: Mapping[str, Flag], environ: Mapping[str, str]) -> list[str]:
    notices = []
    for name, read in {**MEDIA_LIMITS, "root_image_dir": _as_it_is}.items():
        value = environ.get(name.upper())
        if not value or name not in flags:
            continue
        if settings.get(name) is None:
            settings[name] = read(name.upper(), value)
            notices.append(f"{name.upper()}={value} is read as --{name} {value}.")
        elif str(settings[name]) != value:
            notices.append(f"{name.upper()}={value} does nothing: --{name} {settings[name]} is given.")
    return notices


def positive_number(name: str, value: Any) -> float:
    """A number above 0 out of a variable called `name`.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{name}: {value!r} is not a number above 0.")
    return number


def visible_devices(environ: Mapping[str, str]) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES leaves; `None` where it is not set."""
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    if devices is None:
        return None
    return len([device for device in devices.split(",") if device.strip() not in ("", "-1")])


def whole_number(name: str, value: Any) -> int:
    """A positive whole number out of a flag or variable called `name`.

    Raises:
        ConfigError: it is none.
    """
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ConfigError(f"{name}: {value!r} is not a whole number from 1 up.")
    return number


def _policy_workers(
    settings: dict[str, Any], flags: Mapping[str, Flag], environ: Mapping[str, str]
) -> list[str]:
    processes = environ.get("NPROC_PER_NODE")
    nodes = environ.get("NNODES") or "1"
    if not processes and nodes == "1":
        return _visible_workers(settings, flags, environ)
    # As torchrun has it: one process a node, unless it is told.
    each = whole_number("NPROC_PER_NODE", processes or 1)
    workers = each * whole_number("NNODES", nodes)
    given = {"NPROC_PER_NODE": processes, "NNODES": nodes if nodes != "1" else None}
    variables = " ".join(f"{name}={value}" for name, value in given.items() if value)
    if environ.get("NODE_RANK", "0") != "0":
        raise ConfigError(
            f"NODE_RANK={environ['NODE_RANK']}: start the command once, on the head of the Ray cluster; Ray "
            "starts "
            "the workers of all nodes. Unset NODE_RANK if this is that one place."
        )
    per_node = settings.get("policy_workers_per_node")
    if settings.get("policy_workers") is None and per_node is None:
        settings["policy_workers"] = workers
        read = f"--policy_workers {workers}"
        if nodes != "1":
            settings["policy_workers_per_node"] = each
            read += f" --policy_workers_per_node {each}"
        return [f"{variables} is read as {read}."]
    if settings.get("policy_workers") is None:
        same = str(per_node) == str(each) and nodes == "1"
        return [] if same else [f"{variables} does nothing: --policy_workers_per_node {per_node} is given."]
    if str(settings["policy_workers"]) != str(workers):
        return [f"{variables} does nothing: --policy_workers {settings['policy_workers']} is given."]
    return []


def _visible_workers(
    settings: dict[str, Any], flags: Mapping[str, Flag], environ: Mapping[str, str]
) -> list[str]:
    """In SFT every visible GPU trains; in online RL the groups share them, which the cluster decides."""
    devices = visible_devices(environ)
    counted = ("policy_workers", "policy_workers_per_node", "gpus_per_policy_worker")
    given = any(settings.get(name) is not None for name in counted)
    if not devices or given or "rollout_workers" in flags:
        return []
    settings["policy_workers"] = devices
    variable = f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']}"
    return [f"{variable} is read as --policy_workers {devices}."]


def _as_it_is(_: str, value: str) -> str:
    return value


MEDIA_LIMITS: dict[str, Callable[[str, str], Any]] = {
    "max_pixels": whole_number,
    "video_max_pixels": whole_number,
    "fps": positive_number,
    "fps_max_frames": whole_number,
}
"""Settings of how much of a medium is shown, and what reads them out of a variable."""
