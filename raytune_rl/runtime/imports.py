"""Imports of what takes seconds: torch, Transformers, DeepSpeed, vLLM."""

from __future__ import annotations

import gc
import importlib
import sys


def import_once(*names: str) -> None:
    """Imports modules, for whoever imports from them right after, while nobody looks for garbage.

    What a module makes stays for as long as its process. But as there is more and more of it, Python goes
    through all again and again, which takes a fifth to a third of these imports. Nor is it looked through
    later: it is left out from then on (`gc.freeze`), and memory that forked processes share stays shared.
    """
    if all(name in sys.modules for name in names):
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            importlib.import_module(name)
        gc.freeze()
    finally:
        if enabled:
            gc.enable()
