"""Which model, and how it is loaded."""

from __future__ import annotations

from functools import partial
from typing import Literal

from raytune_rl.config.base import Options, setting

_setting = partial(setting, "Model")


class ModelOptions(Options):
    """The base model and the adapters to start from."""

    model: str | None = _setting(None, "Model to train: a local folder or a hub id.")
    adapters: tuple[str, ...] = _setting((), "LoRA adapters to start from: folders or hub ids.")
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = _setting(
        None, "Number type of the weights and of training. Not set: bfloat16 on GPU, float32 on CPU."
    )
    attn_impl: (
        Literal["flash_attn", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "eager"]
        | None
    ) = _setting(
        None,
        "Attention kernel; flash_attn means flash_attention_2. Not set: the best one that the machine has.",
    )
    use_liger_kernel: bool = _setting(
        False, "Triton kernels of liger-kernel for norms, rotary positions and gated layers; on a GPU."
    )
    trust_remote_code: bool = _setting(
        False, "Run Python code that comes with the model. Only for models you trust."
    )
    use_hf: bool = _setting(
        False, "Take ids of models and data sets from Hugging Face instead of ModelScope."
    )
