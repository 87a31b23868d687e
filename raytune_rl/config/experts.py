"""An expert's answers, learned beside the policy's own."""

from __future__ import annotations

from functools import partial

from raytune_rl.config.base import Options, setting

_setting = partial(setting, "RL algorithm")


class ExpertOptions(Options):
    """Whose answers a loss imitates beside its own work; names are ms-swift's."""

    chord_sft_dataset: tuple[str, ...] = _setting(
        (), "--loss_type chord: the expert's conversations, files, folders or hub ids, as for sft."
    )
    chord_sft_per_device_train_batch_size: int | None = _setting(
        None,
        "--loss_type chord: rows of them to each --per_device_train_batch_size completions. Not set: as "
        "many.",
        ge=1,
    )
