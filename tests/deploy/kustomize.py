"""What `kubectl kustomize` makes of our folders: resources and JSON patches (RFC 6902), no more.

`test_manifests.py` compares it with kubectl's own output where kubectl is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def render(place: Path) -> list[dict[str, Any]]:
    """The objects of a manifest, or of a folder with a kustomization."""
    if place.is_file():
        return [item for item in yaml.safe_load_all(place.read_text(encoding="utf-8")) if item]
    text = (place / "kustomization.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    assert settings.keys() <= {"apiVersion", "kind", "resources", "patches"}, place
    objects = [item for name in settings["resources"] for item in render(place / name)]
    for patch in settings.get("patches", ()):
        assert patch.keys() == {"target", "patch"}
        assert patch["target"].keys() == {"kind"}
        targets = [item for item in objects if item["kind"] == patch["target"]["kind"]]
        assert targets, f"{place}: a patch of nothing"
        for target in targets:
            for change in yaml.safe_load(patch["patch"]):
                _change(target, change)
    return objects


def _change(target: dict[str, Any], change: dict[str, Any]) -> None:
    *path, last = [_part(part) for part in change["path"].strip("/").split("/")]
    where: Any = target
    for part in path:
        where = where[part]
    assert change["op"] in ("add", "replace", "remove")
    if change["op"] != "add" and isinstance(where, dict):
        assert last in where, change["path"]
    if change["op"] == "remove":
        del where[last]
    else:
        where[last] = change["value"]


def _part(text: str) -> str | int:
    return int(text) if text.isdigit() else text.replace("~1", "/").replace("~0", "~")
