"""Trying what was trained: at the terminal, or over the rows of a data set."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import setting
from raytune_rl.config.cluster import ClusterOptions
from raytune_rl.config.data import IdentityOptions
from raytune_rl.config.rollout import EngineOptions
from raytune_rl.errors import ConfigError

_model = partial(setting, "Model")
_data = partial(setting, "Data")
_sampling = partial(setting, "Sampling")
_cluster = partial(setting, "Cluster")


class InferConfig(IdentityOptions, ClusterOptions, EngineOptions):
    """`raytune-rl infer`: chat with a model at the terminal, or let it answer the rows of a data set."""

    COMMAND: ClassVar[str] = "infer"

    model: str | None = _model(
        None,
        "A whole model: a checkpoint folder or a hub id. With --adapters: their base model, if it is not "
        "the one they were trained on.",
    )
    adapters: tuple[str, ...] = _model(
        (), "A trained adapter: a checkpoint folder or a hub id. Several are merged in the order given."
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = _model(
        None, "Number type of the weights. Not set: bfloat16 on GPU, float32 on CPU."
    )
    trust_remote_code: bool = _model(
        False, "Run Python code that comes with the model. Only for models you trust."
    )
    use_hf: bool = _model(False, "Take ids from Hugging Face instead of ModelScope.")

    val_dataset: tuple[str, ...] = _data(
        (), "Rows to answer, written like --dataset of sft. Not set: a chat at the terminal."
    )
    result_path: str | None = _data(
        None, "JSONL file for the answers. Not set: infer_result/<time>.jsonl in the model's folder."
    )
    system: str | None = _data(
        None,
        "System prompt for conversations without one of their own: the text, or the path of a .txt file. "
        "Not set: the one that the training run was given.",
    )
    columns: dict[str, str] = _data(
        {}, 'Columns to rename, as JSON: \'{"name in the file": "name that is meant"}\'.'
    )
    strict: bool = _data(
        True,
        "true: a row that cannot be used stops the command with its file and line. "
        "false: it is left out and counted.",
    )
    max_pixels: int | None = _data(
        None,
        "Vision models: most pixels of an image; larger ones are scaled down. Not set: the processor's own.",
        ge=1,
    )
    video_max_pixels: int | None = _data(
        None,
        "Most pixels of a frame of a video; larger frames are scaled down. Not set: the processor's own.",
        ge=1,
    )
    fps: float | None = _data(
        None, "Frames shown of a second of video. Not set: the processor's own, else 2.", gt=0
    )
    fps_max_frames: int | None = _data(
        None, "Most frames shown of a video. Not set: the processor's own.", ge=1
    )
    dataset_num_proc: int = _data(1, "Processes that encode rows.", ge=1)

    max_new_tokens: int | None = _sampling(
        None, "Longest answer in tokens. Not set: what --vllm_max_model_len leaves.", ge=1
    )
    temperature: float | None = _sampling(
        None,
        "Sampling temperature; 0 takes the likeliest token. Not set, as the four after it: what the model's "
        "generation_config.json says.",
        ge=0,
        le=2,
    )
    top_p: float | None = _sampling(
        None, "Sample from the likeliest tokens that make up this probability.", gt=0, le=1
    )
    top_k: int | None = _sampling(None, "Sample from this many likeliest tokens; -1: from all.", ge=-1)
    min_p: float | None = _sampling(
        None, "Leave out tokens less likely than this share of the likeliest.", ge=0, le=1
    )
    repetition_penalty: float | None = _sampling(
        None, "Over 1: tokens already used become less likely.", gt=0
    )
    stop_words: tuple[str, ...] = _sampling((), "Texts that end an answer.")
    seed: int = _sampling(42, "Seed of the draws: the same rows get the same answers.", ge=0)
    stream: bool = _sampling(True, "Chat: show an answer while it is written.")

    rollout_workers: int | None = _cluster(
        None,
        "vLLM engines. Not set: one for a chat; for a data set as many as the cluster's GPUs hold.",
        ge=1,
    )
    gpus_per_rollout_worker: float | None = _cluster(
        None, "GPUs of one engine. Not set: --vllm_tensor_parallel_size where there are GPUs.", ge=0
    )
    cpus_per_rollout_worker: float | None = _cluster(
        None, "CPU cores of one engine. Not set: chosen from what the cluster has.", gt=0
    )

    @model_validator(mode="after")
    def _check_infer(self) -> Self:
        if not self.model and not self.adapters:
            raise ConfigError(
                "--model or --adapters is required: the checkpoint to try, such as "
                "--adapters output/v0-.../checkpoint-100, or --model for one that was trained in full."
            )
        if self.top_k == 0:
            raise ConfigError("--top_k 0 leaves no token to sample: use -1 for all tokens.")
        if self.result_path is not None and not self.val_dataset:
            raise ConfigError("--result_path is for the answers to a data set: give --val_dataset too.")
        max_model_len, answer = self.vllm_max_model_len, self.max_new_tokens
        if max_model_len is not None and answer is not None and max_model_len <= answer:
            raise ConfigError(
                f"--vllm_max_model_len {max_model_len} must hold the conversation and an answer of "
                "--max_new_tokens "
                f"{answer}: raise the first or lower the second."
            )
        return self
