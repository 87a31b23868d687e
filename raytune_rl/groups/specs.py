"""From a config to started groups: what each role is told, and in which environment it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from raytune_rl.algorithms.losses.ppo import ValueSettings
from raytune_rl.config import PPOConfig, PreferenceConfig, RLHFConfig, SFTConfig, deepspeed, resolved
from raytune_rl.config.commands import TrainConfig
from raytune_rl.data.media_tags import MODALITIES
from raytune_rl.errors import ConfigError
from raytune_rl.groups import lora_sync
from raytune_rl.groups.sizes import Groups
from raytune_rl.protocol.data import MediaCounts
from raytune_rl.protocol.media import MediaLimits, Modality
from raytune_rl.protocol.model import ModelSpec, ScoreSettings, Sharing, TunerSettings
from raytune_rl.protocol.rewards import RewardModelSpec
from raytune_rl.protocol.rollout import GPU_SHARE, EngineSpec, MultiTurnSpec, Sampling
from raytune_rl.protocol.train import OptimizerSpec, TrainerSpec
from raytune_rl.workers.reward_model import with_base

UNTIED = {"hf_overrides": {"tie_word_embeddings": False}, "load_format": "dummy"}
"""vLLM's arguments for a model whose files tie head and embedding while the policy does not: the files lack
the head, so it waits for the first version, which has every weight."""
CPU_CACHE_BYTES = 256 * 2**20
SHARED_GPU_SHARE = 0.5
"""Of a GPU's memory, for the engines that sit beside the policy."""
TOKENS_GPU, TOKENS_CPU = 16384, 2048


def model_spec(
    config: TrainConfig, on_gpu: bool, takes_media: bool = False, modalities: Sequence[Modality] = ()
) -> ModelSpec:
    """The model settings of policy and reference: whether it takes media, and their modalities in the
    data.
    """
    assert config.model is not None
    return ModelSpec(
        path=config.model,
        dtype=dtype(config, on_gpu),
        attn_impl=config.attn_impl,
        liger=config.use_liger_kernel,
        layout=layout(config, on_gpu, takes_media),
        trust_remote_code=config.trust_remote_code,
        adapters=config.adapters,
        quant_bits=config.quant_bits,
        use_hf=config.use_hf,
        media_limits=MediaLimits.of(config),
        modalities=tuple(modalities),
        media_threads=1 if config.dataloader_num_workers is None else config.dataloader_num_workers,
        packing_flag=packing_flag(config),
        own_dropout=config.SUPERVISED,
        sharing=sharing(config),
    )


def reference_spec(
    config: PreferenceConfig, groups: Groups, takes_media: bool = False
) -> tuple[ModelSpec, ScoreSettings]:
    """The model settings of a reference that is another model than the one training starts from."""
    path = config.ref_model or config.model
    assert path is not None
    spec = replace(model_spec(config, groups.on_gpu, takes_media), path=path, adapters=config.ref_adapters)
    return spec, ScoreSettings(1.0, config.step_timeout)


def online_reference(config: RLHFConfig, policy: ModelSpec) -> ModelSpec:
    """The model settings of a reference worker of online RL: the policy's start, unless the user names
    another.
    """
    if not (config.ref_model or config.ref_adapters):
        return policy
    return replace(policy, path=config.ref_model or policy.path, adapters=config.ref_adapters)


def dtype(config: TrainConfig, on_gpu: bool) -> str:
    """bfloat16 on GPU and float32 on CPU, unless the user says."""
    return config.torch_dtype or ("bfloat16" if on_gpu else "float32")


def check_machine(config: TrainConfig, on_gpu: bool) -> None:
    """Refuses what cannot be done here and has no stand-in.

    Raises:
        ConfigError: float16, which needs a scaled loss, on a CPU.
    """
    if config.torch_dtype == "float16" and not on_gpu:
        raise ConfigError(
            "--torch_dtype float16 trains on a GPU only: use float32 here, or bfloat16 (slower on most CPUs)."
        )


def layout(config: TrainConfig, on_gpu: bool, takes_media: bool = False) -> str:
    """Packed rows pay where a kernel knows their borders; with masks on a CPU they cost more than padding.

    Models that take media count positions along several axes, by which rows could not be kept apart.
    """
    if takes_media:
        return "padded"
    if config.packs:
        return "packed"
    packed = (
        on_gpu and resolved.attention(config) == "flash_attention_2" and _has_flash_attention()
        if config.padding_free is None
        else config.padding_free
    )
    return "packed" if packed else "padded"


def sharing(config: TrainConfig) -> Sharing:
    """Whether rows that begin alike share that part: completions of one prompt, and the sides of a pair. A
    reward model reads whole rows, and the routers' loss counts each row's tokens."""
    if isinstance(config, SFTConfig) or (isinstance(config, PreferenceConfig) and config.rlhf_type == "rm"):
        return "false"
    return "false" if config.router_aux_loss_coef > 0 else config.prefix_sharing


def packing_flag(config: TrainConfig) -> str:
    """The flag by which the user asks for packed rows; empty if there is none."""
    if config.packs:
        return "--packing true"
    return "--padding_free true" if config.padding_free else ""


def _has_flash_attention() -> bool:
    """Whether flash-attn is installed here, where the workers' environment is the same."""
    return find_spec("flash_attn") is not None


def max_tokens(config: TrainConfig, on_gpu: bool) -> int:
    """Token budget of a micro-batch: on a GPU no more than --per_device_train_batch_size rows of --max_length
    can have, where the user gives both, since memory is what people choose them by.
    """
    if config.max_tokens_per_micro_batch:
        return config.max_tokens_per_micro_batch
    if not on_gpu:
        return TOKENS_CPU
    if config.max_length is None or not config.is_set("per_device_train_batch_size"):
        return TOKENS_GPU
    row = config.max_length
    if isinstance(config, RLHFConfig):
        row += config.max_completion_length
    elif isinstance(config, PreferenceConfig):
        row *= 2
    return min(TOKENS_GPU, config.per_device_train_batch_size * row)


def tuner(config: TrainConfig, dropout: float) -> TunerSettings:
    """The part of the model that is trained."""
    return TunerSettings(
        tuner_type=config.train_type,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=config.target_modules,
        target_regex=config.target_regex,
        target_parameters=config.target_parameters,
        modules_to_save=config.modules_to_save,
        freeze_llm=config.freeze_llm,
        freeze_vit=config.freeze_vit,
        freeze_aligner=config.freeze_aligner,
    )


def optimizer(config: TrainConfig, total_steps: int) -> OptimizerSpec:
    """AdamW, its schedule and DeepSpeed."""
    return OptimizerSpec(
        learning_rate=resolved.learning_rate(config),
        schedule=config.lr_scheduler_type,
        warmup_steps=resolved.warmup_steps(config, total_steps),
        total_steps=total_steps,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        deepspeed=deepspeed.for_engine(config.deepspeed),
        schedule_kwargs=config.lr_scheduler_kwargs,
    )


def policy_spec(
    config: TrainConfig,
    groups: Groups,
    total_steps: int,
    *,
    loss: str,
    loss_settings: Any,
    temperature: float,
    dropout: float,
    publish_mode: str | None = None,
    takes_media: bool = False,
    modalities: Sequence[Modality] = (),
    disallowed_token_ids: tuple[int, ...] = (),
) -> TrainerSpec:
    """The settings of one policy rank: whether the model takes media and their modalities in the data;
    `disallowed_token_ids` are the tokens that sampling never gives.
    """
    return TrainerSpec(
        model=model_spec(config, groups.on_gpu, takes_media, modalities),
        tuner=tuner(config, dropout),
        optimizer=optimizer(config, total_steps),
        loss=loss,
        loss_settings=loss_settings,
        score=ScoreSettings(temperature, config.step_timeout, disallowed_token_ids),
        seed=config.seed,
        gradient_checkpointing=groups.on_gpu
        if config.gradient_checkpointing is None
        else config.gradient_checkpointing,
        publish_mode=publish_mode,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )


def critic_spec(
    config: PPOConfig,
    groups: Groups,
    total_steps: int,
    takes_media: bool = False,
    modalities: Sequence[Modality] = (),
) -> TrainerSpec:
    """The settings of a critic rank. It starts from the first reward model that is a classifier, which knows
    already what is good, else from the policy's base with a new head.
    """
    policy = policy_spec(
        config,
        groups,
        total_steps,
        loss="ppo_value",
        loss_settings=ValueSettings(config.cliprange_value),
        temperature=1.0,
        dropout=config.lora_dropout,
        takes_media=takes_media,
        modalities=modalities,
    )
    start = replace(policy.model, adapters=())
    if (judge := resolved.critic_start(config)) is not None:
        start = with_base(replace(start, path=judge))
    rate = resolved.critic_learning_rate(config)
    slower = replace(policy.optimizer, learning_rate=rate)
    return replace(policy, model=start, optimizer=slower, router_aux_loss_coef=0.0)


def check_readable(config: RLHFConfig, media: MediaCounts) -> None:
    """Reward models read texts.

    Raises:
        ConfigError: There are reward models, and prompts with media.
    """
    if config.reward_model and media.shown:
        shown = " and ".join(f"{count:,} {modality}s" for modality, count in media.shown.items())
        raise ConfigError(
            f"--reward_model reads texts only, but the prompts have {shown}: use reward functions."
        )


def reward_model_spec(config: RLHFConfig, groups: Groups) -> RewardModelSpec:
    """The settings of a reward model worker."""
    several = len(config.reward_model) > 1
    base = replace(model_spec(config, groups.on_gpu), adapters=(), quant_bits=None)
    return RewardModelSpec(
        models=tuple(replace(base, path=path) for path in config.reward_model),
        labels=tuple(
            f"RewardModel{number if several else ''}" for number in range(1, len(config.reward_model) + 1)
        ),
        max_tokens=max_tokens(config, groups.on_gpu),
        timeout_s=config.step_timeout,
        plugins=config.reward_model_plugin,
        plugin_files=config.external_plugins,
    )


def prompt_limits(
    config: RLHFConfig, takes_media: bool, sets: Sequence[MediaCounts]
) -> dict[str, int] | None:
    """Most items of each modality in one prompt of a model that takes media: what the user says, else what
    the data sets have.

    Raises:
        ConfigError: The data has a prompt with more of a modality than the user allows.
    """
    if not takes_media:
        return None
    most: dict[str, int] = {
        modality: max((one.most.get(modality, 0) for one in sets), default=0)
        for modality in MODALITIES.values()
    }
    # An engine that may have none at all would not be one for media.
    least = most if any(most.values()) else {**most, "image": 1}
    limits = {**least, **config.vllm_limit_mm_per_prompt}
    for modality, count in most.items():
        if limits[modality] < count:
            raise ConfigError(
                f"--vllm_limit_mm_per_prompt allows {limits[modality]} {modality}s, but a prompt has "
                f"{count}. "
                "Raise it, or leave it out."
            )
    return limits


def engine_spec(
    config: RLHFConfig,
    groups: Groups,
    max_model_len: int,
    store: str,
    rank: int,
    media: dict[str, int] | None = None,
) -> EngineSpec:
    """The settings of a rollout worker; `media` are the limits of a model that takes media."""
    assert config.model is not None
    on_gpu = groups.on_gpu
    eager = not on_gpu if config.vllm_enforce_eager is None else config.vllm_enforce_eager
    adapter = lora_sync.publish_mode(config, media is not None) == "adapter"
    return EngineSpec(
        model=config.model,
        dtype=dtype(config, on_gpu),
        max_model_len=max_model_len,
        store=store,
        pull_timeout_s=config.step_timeout,
        tensor_parallel_size=config.vllm_tensor_parallel_size,
        gpu_memory_utilization=gpu_share(config, groups),
        kv_cache_bytes=None if on_gpu else CPU_CACHE_BYTES,
        max_num_seqs=config.vllm_max_num_seqs,
        enforce_eager=eager,
        enable_prefix_caching=config.vllm_enable_prefix_caching,
        lora_rank=lora_sync.engine_rank(config) if adapter else 0,
        trust_remote_code=config.trust_remote_code,
        seed=config.seed + rank,
        use_hf=config.use_hf,
        sleep_level=sleep_level(config, groups),
        prompt_limits=media,
        media_limits=MediaLimits.of(config),
        more={**(UNTIED if lora_sync.unties(config, media is not None) else {}), **config.vllm_engine_kwargs},
        multi_turn=multi_turn(config),
    )


def gpu_share(config: RLHFConfig, groups: Groups) -> float:
    """The share of a GPU's memory that vLLM may take: it refuses to start where less is free, and beside it
    the policy holds its weights.
    """
    if config.vllm_gpu_memory_utilization is not None:
        return config.vllm_gpu_memory_utilization
    if not groups.colocated:
        return GPU_SHARE
    engines = -(-groups["rollout"].workers // groups["policy"].workers)
    return int(100 * SHARED_GPU_SHARE / engines) / 100


def sleep_level(config: RLHFConfig, groups: Groups) -> int:
    """The memory that engines give up while others work: nothing where nobody shares their GPUs. Unless the
    user says, 1 where an adapter comes to weights that stay, 2 where the next version overwrites them all.
    """
    if not (groups.on_gpu and groups.colocated):
        return 0
    if config.sleep_level is not None:
        return config.sleep_level
    return 2 if config.train_type == "full" or config.vllm_enable_lora is False else 1


def multi_turn(config: RLHFConfig) -> MultiTurnSpec | None:
    """Who answers the model, if anybody does."""
    if config.multi_turn_scheduler is None:
        return None
    return MultiTurnSpec(
        config.multi_turn_scheduler, config.max_turns, config.external_plugins, config.reward_timeout
    )


def sampling(
    config: RLHFConfig,
    stop_token_ids: tuple[int, ...],
    disallowed_token_ids: tuple[int, ...] = (),
    *,
    evaluation: bool = False,
) -> Sampling:
    """How completions are drawn; the chat template says which tokens end a turn, the processor which none may
    have.
    """
    return Sampling(
        temperature=resolved.eval_temperature(config) if evaluation else config.temperature,
        max_tokens=config.max_completion_length,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop_words=config.stop_words,
        stop_token_ids=stop_token_ids,
        disallowed_token_ids=disallowed_token_ids,
    )


def media_notices(config: TrainConfig, on_gpu: bool, takes_media: bool) -> list[str]:
    """One line for what the model's taking media, or not, changes."""
    if takes_media:
        if layout(config, on_gpu) == "packed":
            return ["the model takes media: its rows are padded, as they cannot be packed"]
        return []
    names = (
        "freeze_llm", "freeze_vit", "freeze_aligner", "max_pixels", "video_max_pixels", "fps",
        "fps_max_frames", "root_image_dir", "inline_media",
    )  # fmt: skip
    online = ("vllm_limit_mm_per_prompt",) if config.ONLINE else ()
    given = [f"--{name}" for name in (*names, *online) if config.is_set(name)]
    does = "do" if len(given) > 1 else "does"
    notices = [f"{', '.join(given)} {does} nothing: the model takes texts only"] if given else []
    if config.is_set("dataloader_num_workers"):
        notices.append(
            "--dataloader_num_workers does nothing: rows of texts are prepared before training and read "
            "from shared memory"
        )
    return notices


def machine_notices(config: TrainConfig, on_gpu: bool) -> list[str]:
    """One line for each flag that this machine cannot honour as written, saying what is done instead."""
    if on_gpu:
        return []
    notices = []
    if config.torch_dtype == "bfloat16":
        notices.append(
            f"--torch_dtype {config.torch_dtype} is slow on a CPU without hardware for it; float32 is the "
            "fast choice here"
        )
    if config.attn_impl and config.attn_impl.startswith("flash"):
        notices.append(f"--attn_impl {config.attn_impl} needs a GPU: sdpa is used here")
    if config.use_liger_kernel:
        notices.append("--use_liger_kernel needs a GPU: the model's own layers are used here")
    if isinstance(config, RLHFConfig):
        asleep = [
            f"--{name}"
            for name in ("sleep_level", "offload_model", "offload_optimizer")
            if getattr(config, name)
        ]
        if config.vllm_gpu_memory_utilization is not None:
            notices.append(
                "--vllm_gpu_memory_utilization does nothing on a CPU: the engine's cache has "
                f"{CPU_CACHE_BYTES // 2**20} MiB"
            )
        if asleep:
            notices.append(f"{', '.join(asleep)}: there is no GPU memory to free on a CPU, nothing is moved")
    return notices
