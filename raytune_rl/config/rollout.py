"""How completions are sampled, and the engine that samples them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Self

from pydantic import model_validator

from raytune_rl.config.base import Options, setting
from raytune_rl.errors import ConfigError

_sampling = partial(setting, "Sampling")
_turns = partial(setting, "Several turns")
_vllm = partial(setting, "Rollout engine (vLLM)")


_OURS = {
    "model": "--model",
    "dtype": "--torch_dtype",
    "seed": "--seed",
    "trust_remote_code": "--trust_remote_code",
    "max_model_len": "--vllm_max_model_len",
    "max_num_seqs": "--vllm_max_num_seqs",
    "tensor_parallel_size": "--vllm_tensor_parallel_size",
    "gpu_memory_utilization": "--vllm_gpu_memory_utilization",
    "enforce_eager": "--vllm_enforce_eager",
    "enable_prefix_caching": "--vllm_enable_prefix_caching",
    "limit_mm_per_prompt": "--vllm_limit_mm_per_prompt",
    "enable_lora": "--vllm_enable_lora",
    "max_lora_rank": "--vllm_max_lora_rank",
    "max_loras": "there is one adapter",
    "enable_sleep_mode": "--sleep_level",
    "logprobs_mode": "the loss compares with it",
    "weight_transfer_config": "weights come from the store",
}


class EngineOptions(Options):
    """How one vLLM engine is built."""

    vllm_gpu_memory_utilization: float | None = _vllm(
        None,
        "Share of a GPU's memory for vLLM's weights and cache. Not set: 0.9, or 0.5 where vLLM sits beside "
        "the policy.",
        gt=0,
        le=1,
    )
    vllm_max_model_len: int | None = _vllm(
        None, "Longest prompt and completion together, in tokens. Not set: what the run needs.", ge=1
    )
    vllm_tensor_parallel_size: int = _vllm(1, "GPUs that one rollout worker spreads its model over.", ge=1)
    vllm_max_num_seqs: int | None = _vllm(
        None, "Most completions that one worker samples at a time. Not set: vLLM's default.", ge=1
    )
    vllm_enforce_eager: bool | None = _vllm(
        None, "No compiled graphs: starts faster, samples slower. Not set: true on CPU, false on GPU."
    )
    vllm_enable_prefix_caching: bool = _vllm(True, "Compute a prompt once for all its completions.")
    vllm_max_lora_rank: int | None = _vllm(
        None, "Largest adapter rank that the engine makes room for. Not set: the adapter's own.", ge=1
    )


class RolloutOptions(EngineOptions):
    """Sampling and vLLM."""

    num_generations: int = _sampling(8, "Completions per prompt: the size of a group.", ge=1)
    num_generations_eval: int | None = _sampling(
        None, "The same in evaluation. Not set: as --num_generations.", ge=1
    )
    max_completion_length: int = _sampling(512, "Longest completion in tokens.", ge=1)
    temperature: float = _sampling(
        0.9,
        "Sampling temperature. From 0.01 to 2. Log-probs in the loss are taken at the same temperature.",
        ge=0.01,
        le=2,
    )
    eval_temperature: float | None = _sampling(
        None,
        "Temperature in evaluation; 0: greedy, always the likeliest token. Not set: --temperature.",
        ge=0,
        le=2,
    )
    top_p: float = _sampling(
        1.0, "Sample from the likeliest tokens that make up this probability.", gt=0, le=1
    )
    top_k: int = _sampling(-1, "Sample from this many likeliest tokens; -1: from all.", ge=-1)
    min_p: float = _sampling(
        0.0, "Leave out tokens less likely than this share of the likeliest.", ge=0, le=1
    )
    repetition_penalty: float = _sampling(1.0, "Over 1: tokens already used become less likely.", gt=0)
    multi_turn_scheduler: str | None = _turns(
        None,
        "Scheduler that answers the model and lets it go on: math_tip_trick, or one that a file of "
        "--external_plugins registers by multi_turns['name'] = Class. What it adds is not trained on.",
    )
    max_turns: int | None = _turns(
        None, "Most turns of the model. Not set: until the scheduler ends it or the length does.", ge=1
    )
    stop_words: tuple[str, ...] = _sampling((), "Texts that end a completion.")

    use_vllm: bool = _vllm(True, "Sample with vLLM, the only rollout engine.")
    vllm_mode: Literal["colocate", "server"] | None = _vllm(
        None,
        "colocate: rollout shares the policy's GPUs; server: rollout workers on GPUs of their own. "
        "The same as --colocate true or false.",
    )
    vllm_limit_mm_per_prompt: dict[str, int] = _vllm(
        {}, "Most images, videos or audios in one prompt, as JSON: '{\"image\": 2}'."
    )
    vllm_enable_lora: bool | None = _vllm(
        None,
        "true: only the LoRA adapter travels to the engine; false: it is merged and the weights travel. "
        "Not set: the adapter alone wherever the engine can take it.",
    )
    weight_delta: bool = _vllm(
        False,
        "Publish weights as their difference to an older version, bit for bit, where that is at most half as "
        "large: for weights in 16 bits, small learning rates and engines behind a slow network. Within one "
        "machine whole weights are faster.",
    )
    max_logp_gap: float | None = _vllm(
        None,
        "Largest difference of log-probs between engine and policy that is taken for rounding, nats a token. "
        "At the start, and when an engine was started anew, a probe above it ends the run; later a step's "
        "mean above it warns, and three in a row end the run. 0: never look. Not set: 0.005 for float32, 0.3 "
        "for bfloat16 and float16, 1 if anything is quantised, each divided by a --temperature below 1; and "
        "steps are not watched where --top_p and the like cut the distribution.",
        ge=0,
    )
    vllm_engine_kwargs: dict[str, Any] = _vllm(
        {}, 'Further arguments of vLLM\'s EngineArgs, as JSON: \'{"kv_cache_dtype": "fp8"}\'.'
    )
    sleep_level: Literal[0, 1, 2] | None = _vllm(
        None,
        "Colocated engine while the policy trains: 0 keeps its memory, 1 drops the cache and moves weights "
        "to CPU, 2 drops both. Not set, on shared GPUs: 1 where an adapter is trained, 2 in full training.",
    )
    offload_model: bool = _vllm(
        False,
        "Move the weights of policy, critic and reference to CPU while the engine on their GPU samples. "
        "Reward models stay: they score while it is awake.",
    )
    offload_optimizer: bool = _vllm(
        False, "Move the optimizers' state to CPU while the engine on their GPU samples."
    )

    @model_validator(mode="after")
    def _check_rollout(self) -> Self:
        if not self.use_vllm:
            raise ConfigError(
                "--use_vllm false: vLLM is the only rollout engine here, on GPU and on CPU; leave it out."
            )
        if self.top_k == 0:
            raise ConfigError("--top_k 0 leaves no token to sample: use -1 for all tokens.")
        if taken := sorted(set(self.vllm_engine_kwargs) & set(_OURS)):
            flags = ", ".join(f"{name} ({_OURS[name]})" for name in taken)
            raise ConfigError(
                f"--vllm_engine_kwargs may not set what has a flag or follows from it: {flags}."
            )
        max_model_len = self.vllm_max_model_len
        if max_model_len is not None and max_model_len <= self.max_completion_length:
            raise ConfigError(
                f"--vllm_max_model_len {max_model_len} must hold the prompt and the completion, but "
                "--max_completion_length "
                f"is {self.max_completion_length}: raise the first or lower the second."
            )
        return self
