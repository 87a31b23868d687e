"""Settings of the export of a trained model."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import SecretStr, model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_setting = partial(setting, "Export")


class ExportConfig(Options):
    """`raytune-rl export`: merge an adapter into its base model, or push to a hub."""

    COMMAND: ClassVar[str] = "export"

    adapters: tuple[str, ...] = _setting(
        (), "The trained adapter: a checkpoint folder or a hub id. Several are merged in the order given."
    )
    model: str | None = _setting(
        None, "The base model, or the whole model to push. Not set: what the adapter was trained on."
    )
    merge_lora: bool = _setting(False, "Write the base model with the adapter merged into it.")
    output_dir: str | None = _setting(None, "Where to write. Not set: <checkpoint>-merged.")
    exist_ok: bool = _setting(False, "Replace what is there already.")
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = _setting(
        None, "Number type of the merged weights. Not set: the base model's own."
    )
    trust_remote_code: bool = _setting(
        False, "Run Python code that comes with the base model. Only for models you trust."
    )
    push_to_hub: bool = _setting(False, "Upload to ModelScope, or with --use_hf true to Hugging Face.")
    hub_model_id: str | None = _setting(
        None, "Name on the hub: <your-namespace>/<model-name>; without a namespace it is the token's owner's."
    )
    hub_private_repo: bool = _setting(
        True, "Whether a repository that has to be created is private. One that exists stays as it is."
    )
    hub_token: SecretStr | None = _setting(
        None,
        "Access token of the hub; it is never written anywhere. Better given by the environment, where a "
        "list of processes does not show it: MODELSCOPE_API_TOKEN or HF_TOKEN.",
        exclude=True,
    )
    use_hf: bool = _setting(False, "Hugging Face instead of ModelScope.")

    @model_validator(mode="after")
    def _check_export(self) -> Self:
        if not (self.merge_lora or self.push_to_hub):
            raise ConfigError("Nothing to export: say --merge_lora true, --push_to_hub true, or both.")
        if self.merge_lora and not self.adapters:
            raise ConfigError("--merge_lora true needs the adapter to merge: --adapters names 0.")
        if not self.merge_lora and len(self.adapters) > 1:
            raise ConfigError(
                f"--push_to_hub true uploads one adapter: --adapters names {len(self.adapters)}. "
                "Name one, or upload what they give together with --merge_lora true."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("--push_to_hub true needs --hub_model_id <your-namespace>/<model-name>.")
        if self.push_to_hub and not (self.adapters or self.model):
            raise ConfigError("--push_to_hub true needs something to push: --adapters or --model.")
        return self
