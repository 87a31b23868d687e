"""Whether a run that was begun earlier is the one that is asked for now: the same model, data and tuner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAME_ALWAYS = ("rlhf_type", "model", "dataset", "train_type", "adapters", "quant_bits")
SAME_FOR = {
    "lora": ("lora_rank", "use_dora", "target_modules", "target_regex", "modules_to_save"),
    "full": ("freeze_llm", "freeze_vit", "freeze_aligner"),
}
PATHS = ("model", "dataset", "adapters")


def differences(
    asked: Mapping[str, Any], found: Mapping[str, Any], found_in: Path, asked_in: Path | None = None
) -> list[str]:
    """What makes two runs two: one sentence a setting, none if they are the same.

    Args:
        asked, found: Settings as in args.json.
        found_in, asked_in: The folders that relative paths of each are of; `asked_in` is the present one.
    """
    names = [*SAME_ALWAYS, *SAME_FOR.get(str(asked.get("train_type")), ())]
    told = []
    for name in names:
        known = name in found or name == "rlhf_type"  # a run of before a setting was there says nothing of it
        now, before = asked.get(name), found.get(name)
        if known and _plain(name, now, asked_in or Path.cwd()) != _plain(name, before, found_in):
            told.append(f"--{name} {_shown(name, now)} is asked for, it has {_shown(name, before)}")
    return told


def _plain(name: str, value: Any, folder: Path) -> Any:
    """A value in the one way in which it is compared: paths in full, lists as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(name, item, folder) for item in value)
    return _place(value, folder) if name in PATHS and isinstance(value, str) else value


def _place(text: str, folder: Path) -> str:
    """A local path in full, what it says of samples and subsets as it is; any other name as it is."""
    for head, mark, tail in ((text, "", ""), text.rpartition("#"), text.partition("#")[0].partition(":")):
        if not head:
            continue
        path = folder / Path(head).expanduser()
        if path.exists():
            return f"{path.resolve()}{mark}{tail}"
    return text.rstrip("/")


def _shown(name: str, value: Any) -> str:
    if value is None and name == "rlhf_type":
        return "(SFT)"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) and value else str(value)
