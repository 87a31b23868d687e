"""DeepSpeed's C++ part for collectives on a CPU, compiled when a machine needs it for the first time.

PyTorch guards such a compilation with a file that stays where the compiler's process was killed, and all
others wait for it to go, for ever. Here a lock of the operating system, which ends with its holder, goes
around it, in a folder that only this package compiles into: a file that is found then is a dead one's.
"""

from __future__ import annotations

import os
from pathlib import Path

from raytune_rl.errors import DeadlineExceededError


def compile_ops(timeout_s: float) -> None:
    """Compiles what DeepSpeed will load into this process, or finds it compiled. Nothing to do on a GPU.

    Raises:
        DeadlineExceededError: Another process was compiling for `timeout_s` seconds.
    """
    from deepspeed.accelerator import get_accelerator
    from filelock import FileLock, Timeout
    from torch import __version__ as torch_version
    from torch.utils.cpp_extension import get_default_build_root

    if get_accelerator().device_name() != "cpu":
        return
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    own = Path("raytune_rl") / f"torch-{torch_version}"
    folder = Path(root) if Path(root).parts[-2:] == own.parts else Path(root) / own
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    try:
        with FileLock(folder / "compiling.lock", timeout=timeout_s):
            for left in folder.glob("*/lock"):
                left.unlink()
            get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    except Timeout as error:
        raise DeadlineExceededError(
            f"another process has been compiling DeepSpeed's operators in {folder} for {timeout_s:.0f} s"
        ) from error
