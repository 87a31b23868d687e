"""`raytune-rl`: argv to a config, a config to its pipeline.

Nothing heavy is imported until a config stands, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from raytune_rl.errors import ConfigError, RaytuneError
from raytune_rl.redaction import hide_in_tracebacks, redact_text
from raytune_rl.runtime.signals import Received, ending_on_sigterm

if TYPE_CHECKING:
    from raytune_rl.config.parser import Parsed

_COMMANDS = {
    "sft": ("SFTConfig", "supervised fine-tuning"),
    "rlhf": ("RLHFConfig", "GRPO, DAPO, PPO; from preferences DPO, KTO, ORPO, CPO, SimPO, RM"),
    "reward-check": ("RewardCheckConfig", "try reward functions on a data set, without a model"),
    "algorithms": ("AlgorithmsConfig", "every loss and credit, with its paper and its flags"),
    "infer": ("InferConfig", "chat with a trained model, or let it answer a data set"),
    "export": ("ExportConfig", "merge a LoRA adapter, push a model to a hub"),
}
"""By command: the name of its class in `raytune_rl.config`, and what it does."""
PLAN = "plan"
_PLANNED = ("sft", "rlhf")
"""Commands that `plan` stands before."""

_PIPELINES = {
    "SFTConfig": "raytune_rl.pipelines.sft",
    "PPOConfig": "raytune_rl.pipelines.ppo",
    "PreferenceConfig": "raytune_rl.pipelines.preference",
    "RLHFConfig": "raytune_rl.pipelines.online",
    "RewardCheckConfig": "raytune_rl.pipelines.reward_check",
    "AlgorithmsConfig": "raytune_rl.pipelines.algorithms",
    "InferConfig": "raytune_rl.infer",
    "ExportConfig": "raytune_rl.export",
}

_REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG, errno.ETIMEDOUT,
}  # fmt: skip
"""What is wrong with the machine, and no defect here."""

_USAGE = (
    "usage: raytune-rl COMMAND [config.yaml] [--flag value ...]\n\ncommands:\n"
    + "".join(f"  {name:<14}{what}\n" for name, (_, what) in _COMMANDS.items())
    + f"  {PLAN:<14}before sft or rlhf: who would run where, in which memory; starts nothing\n"
    + "\nraytune-rl COMMAND --help explains a command's flags. raytune-rl --version tells\nthe version.\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 done, 1 failed, 2 the request cannot be honoured, 130 interrupted, 143 ended by
        SIGTERM before training.
    """
    return guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def guarded(command: Callable[[], int]) -> int:
    """Runs a program's main function and says what went wrong in words, as `raytune-rl` does; a defect keeps
    its traceback.

    Returns:
        The function's own exit status, or 1, 2, 130 or 143 as `main`.
    """
    hide_in_tracebacks()
    with ending_on_sigterm() as received:
        return _guarded(command, received)


def _guarded(command: Callable[[], int], received: Received) -> int:
    try:
        return command()
    except ConfigError as error:
        print(f"raytune-rl: {error}", file=sys.stderr)
        return 2
    except RaytuneError as error:
        print(f"raytune-rl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("raytune-rl: interrupted", file=sys.stderr)
        return received.exit_status
    except MemoryError as error:
        from raytune_rl.runtime.out_of_memory import explained

        said = explained("the driver", "running", f"MemoryError: {error}")
        print(f"raytune-rl: {said}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"raytune-rl: the system refused: {error.strerror or error}{where}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        (sys.stdout if argv else sys.stderr).write(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from raytune_rl import __version__

        print(__version__)
        return 0
    name, *rest = argv
    if name == PLAN:
        if not rest or rest[0] not in _PLANNED:
            raise ConfigError(
                f"raytune-rl {PLAN} stands before a command that trains: raytune-rl {PLAN} sft ..., or "
                f"raytune-rl {PLAN} rlhf ..., with the flags of the run."
            )
        name, rest = rest[0], [*rest[1:], "--dry_run", "true"]
    if name not in _COMMANDS:
        from raytune_rl.config.explain import did_you_mean

        known = [*_COMMANDS, PLAN]
        raise ConfigError(
            f"Unknown command {name!r}.{did_you_mean(name, known)} Commands: {', '.join(known)}."
        )
    from raytune_rl import config
    from raytune_rl.config.parser import parse, rlhf_class

    config_class = rlhf_class(rest) if name == "rlhf" else getattr(config, _COMMANDS[name][0])
    try:
        parsed = parse(rest, config_class)
    except SystemExit:
        return 0
    except BrokenPipeError:  # whoever reads the help has seen enough of it: `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    for notice in parsed.notices:
        print(f"raytune-rl: {redact_text(notice)}", file=sys.stderr)
    result = _dispatch(parsed)
    return 130 if getattr(result, "status", None) == "interrupted" else 0


def _dispatch(parsed: Parsed[Any]) -> object:
    dry = getattr(parsed.config, "dry_run", False)
    module = "raytune_rl.pipelines.dry_run" if dry else _PIPELINES[type(parsed.config).__name__]
    run: Callable[..., object] = import_module(module).run
    return run(parsed.config)


if __name__ == "__main__":
    sys.exit(main())
