"""`raytune-rl export`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_rl.config import ExportConfig

if TYPE_CHECKING:
    from raytune_rl.export.merge import Merged
    from raytune_rl.export.push import Pushed


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        merged: the model that was written, if a merge was asked for.
        pushed: what was uploaded, if that was asked for.
    """

    merged: Merged | None = None
    pushed: Pushed | None = None


def run(config: ExportConfig, say: Callable[[str], None] | None = None) -> ExportResult:
    """Merges, pushes, or merges and pushes what it merged.

    Args:
        config: what the user asked for.
        say: takes the lines for the user, none of which holds the token. None prints them.

    Raises:
        RaytuneError: by name, see `merge` and `push`. What was merged stays if the push fails: the message of
            the push says how to go on with it.
    """
    # Bound to today's stdout: a hub's client gets another one while it works.
    say = say or partial(print, file=sys.stdout, flush=True)
    # Imported here: a push needs no torch, and a merge no client of a hub.
    merged = pushed = None
    destination = None
    if config.push_to_hub:
        from raytune_rl.export.push import prepare

        destination = prepare(config)  # a bad name or token is told before the work of a merge
    if config.merge_lora:
        from raytune_rl.export.merge import merge

        merged = merge(config, say)
        _tell(merged, say)
    if destination is not None:
        from raytune_rl.export.push import push

        if merged is None:
            folder = Path((config.adapters or (config.model or "",))[0]).expanduser().absolute()
            if config.adapters and config.model:
                say(f"--model {config.model} does nothing: the adapter is uploaded as it is")
        else:
            folder = merged.path
            say(f"if the upload stops, go on with --model {folder} in place of --adapters and --merge_lora")
        pushed = push(destination, folder, say)
    return ExportResult(merged, pushed)


def _tell(merged: Merged, say: Callable[[str], None]) -> None:
    parity = merged.parity
    what = f"a text and a {parity.medium}" if parity.medium else "a text"
    say(f"merged: {merged.path}")
    say(
        "logits of the merged model differ from those of base and adapter by at most "
        f"{parity.difference:.3g} on {what} of {parity.tokens} tokens ({merged.dtype} allows "
        f"{parity.tolerance:.3g}; the adapter moves them by {parity.effect:.3g})"
    )
    if 2 * parity.difference > parity.effect > 0:
        say(f"what the adapter does is as small as {merged.dtype}'s rounding: --torch_dtype float32 keeps it")
