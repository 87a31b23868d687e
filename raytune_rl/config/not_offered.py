"""Flags of ms-swift, and of the Trainer below it, that have no setting here.

Those of `IDLE` are read: what they may say happens anyway. Those of `NOT_BUILT` are refused, as what they
are and not as a misspelling, with what to do instead where there is something.
"""

from __future__ import annotations

_TRUE = ("true",)
_FALSE = ("false",)
_ANY: tuple[str, ...] = ()

IDLE: dict[str, tuple[tuple[str, ...], str]] = {
    "check_model": (_ANY, "no network is asked about a model that is there"),
    "lazy_tokenize": (_ANY, "rows are tokenized before training, a stream's while it trains"),
    "remove_unused_columns": (_ANY, "columns that nobody reads are not carried along"),
    "ddp_find_unused_parameters": (_ANY, "DeepSpeed needs no such hint"),
    "dataloader_pin_memory": (_ANY, "rows are read from Ray's shared memory"),
    "dataloader_persistent_workers": (_ANY, "rows are read from Ray's shared memory"),
    "dataloader_prefetch_factor": (_ANY, "rows are read from Ray's shared memory"),
    "enable_flattened_weight_sync": (_ANY, "weights always travel in large flat buckets"),
    "logging_strategy": (("steps",), "lines are logged every --logging_steps steps"),
    "logging_first_step": (_TRUE, "step 1 is always logged"),
    "optim": (("adamw_torch", "adamw_torch_fused"), "the optimizer is PyTorch's AdamW"),
    "ignore_data_skip": (_FALSE, "a resumed run goes on with the rows that come next"),
    "resume_only_model": (_FALSE, "a resumed run takes up the optimizer too"),
    "disable_auto_column_mapping": (_FALSE, "columns are found by their names; --columns renames others"),
    "dataloader_drop_last": (_FALSE, "the last step of an epoch may hold fewer rows; none is dropped"),
    "group_by_length": (_FALSE, "which rows a step has is drawn; only within it are they grouped by length"),
    "gc_collect_after_offload": (
        _ANY,
        "collecting by hand clashed with vLLM's allocator, and ms-swift has removed it too",
    ),
    "log_rollout_offpolicy_metrics": (_ANY, "rollout_correction/* is measured on every step"),
    "precompute_ref_log_probs": (
        _ANY,
        "log-probs under the reference are always taken once, before the first step",
    ),
    "local_rollout_forward_batch_size": (
        _ANY,
        "forward passes are filled by tokens, up to --max_tokens_per_micro_batch",
    ),
    "num_sample_generations": (
        _ANY,
        "--log_completions true writes down every completion, and --val_dataset evaluates",
    ),
}
"""Name to the values that may follow it (none named: any) and why it does nothing."""

IDLE_ONLY_WITH = {
    "gc_collect_after_offload": "rollout_workers",
    "log_rollout_offpolicy_metrics": "rollout_workers",
    "precompute_ref_log_probs": "rpo_alpha",
    "local_rollout_forward_batch_size": "num_ppo_epochs",
    "num_sample_generations": "num_ppo_epochs",
}
"""Of `IDLE`: a flag of the commands that read it; the others are read by every command that trains."""

_ONE_RATE = "one --learning_rate holds for all that is trained"
_DTYPE = "say --torch_dtype"
_TEMPLATE = "the model's own configuration and chat template say it"
_GYM = "--multi_turn_scheduler lets an environment of your own answer"

NOT_BUILT: dict[str, str] = {
    # tuner
    "aligner_lr": _ONE_RATE, "vit_lr": _ONE_RATE, "lorap_lr_ratio": _ONE_RATE,
    "freeze_parameters": "freeze parts by --freeze_llm, --freeze_vit, --freeze_aligner",
    "freeze_parameters_ratio": "freeze parts by --freeze_llm, --freeze_vit, --freeze_aligner",
    "freeze_parameters_regex": "freeze parts by --freeze_llm, --freeze_vit, --freeze_aligner",
    "trainable_parameters": "name modules by --target_modules or --target_regex",
    "trainable_parameters_regex": "name modules by --target_modules or --target_regex",
    "init_weights": "adapters start at 0", "init_lora_weights": "adapters start at 0",
    "lora_bias": "biases stay as they are", "lora_dtype": "adapters are trained in float32 beside their base",
    "lora_ga_batch_size": "", "use_galore": "", "use_swift_lora": "", "lisa_activated_layers": "",
    "llamapro_num_new_blocks": "", "adalora_target_r": "", "reft_rank": "", "boft_block_size": "",
    "bnb_4bit_compute_dtype": "it is --torch_dtype", "bnb_4bit_quant_type": "it is nf4",
    "bnb_4bit_use_double_quant": "it is true", "hqq_axis": "",
    # training
    "bf16": _DTYPE, "fp16": _DTYPE, "tf32": "", "optimizer": "the optimizer is AdamW",
    "neftune_noise_alpha": "", "sequence_parallel_size": "",
    "vit_gradient_checkpointing": "--gradient_checkpointing holds for the vision tower too",
    "gradient_checkpointing_kwargs": "recomputation is never reentrant",
    "ddp_timeout": "--step_timeout and --start_timeout are the deadlines", "ddp_backend": "",
    "fsdp": "use --deepspeed zero3", "fsdp_config": "use --deepspeed zero3", "torch_compile": "",
    "local_rank": "Ray starts the workers", "use_ray": "Ray always starts the workers",
    "device_groups": "groups have sizes: --policy_workers, --rollout_workers and their like",
    "device_map": "", "max_memory": "",
    "metric_for_best_model": "it is the loss, in online RL the reward", "greater_is_better": "",
    "load_best_model_at_end": "the summary names the best checkpoint",
    "create_checkpoint_symlink": "the summary names the last and the best checkpoint",
    "save_safetensors": "weights are always safetensors", "logging_dir": "it is runs/ in the run's folder",
    "run_name": "a run has the name of its folder", "predict_with_generate": "raytune-rl infer answers rows",
    "early_stop_interval": "", "eval_on_start": "it is always done",
    "max_epochs": "use --num_train_epochs", "use_logits_to_keep": "logits are made a piece at a time",
    "acc_strategy": "token_acc counts tokens",
    "average_tokens_across_devices": "a loss is always such a mean",
    "galore_rank": "", "task_type": "", "num_labels": "", "problem_type": "",
    "swanlab_project": "SwanLab's own SWANLAB_* variables say it",
    "swanlab_token": "SwanLab's own SWANLAB_* variables say it",
    "swanlab_exp_name": "SwanLab's own SWANLAB_* variables say it",
    # model and data
    "model_type": _TEMPLATE, "template": _TEMPLATE, "template_backend": _TEMPLATE, "model_revision": "",
    "rope_scaling": "", "new_special_tokens": "", "response_prefix": "",
    "padding_side": "rows are laid out as they must be", "norm_bbox": "", "agent_template": _TEMPLATE,
    "use_chat_template": "",
    "enable_thinking": "say it in the rows' column chat_template_kwargs", "add_non_thinking_prefix": "",
    "cached_dataset": "", "custom_dataset_info": "", "interleave_prob": "", "stopping_strategy": "",
    "val_dataset_shuffle": "all are used",
    "train_dataloader_shuffle": "use --dataset_shuffle",
    "packing_length": "packs hold --max_length tokens", "packing_num_proc": "", "download_mode": "",
    # online RL
    "move_model_batches": "", "chord_mu": "use --chord_mu_peak and --chord_mu_valley",
    "chord_phi": "use --chord_enable_phi_function",
    "use_gym_env": _GYM, "gym_env": _GYM, "context_manager": _GYM,
    "completion_length_limit_scope": "each answer of several turns may have --max_completion_length tokens",
    "infer_backend": "answers come from vLLM", "use_liger_loss": "",
    "reference_free": "", "offload_teacher_model": "",
    "seq_kd": "let the teacher answer the prompts by raytune-rl infer, and give its answers as --dataset",
    "vllm_data_parallel_size": "use --rollout_workers", "vllm_pipeline_parallel_size": "",
    "vllm_disable_custom_all_reduce": "use --vllm_engine_kwargs", "vllm_quantization": "",
    "offload_bridge": "", "teacher_deepspeed": "teachers are asked by --teacher_workers, each with its model",
    "teacher_model_server": "no server is contacted: use --teacher_model and --teacher_backend vllm",
}  # fmt: skip
"""Name to what to do instead, or nothing."""


def instead_of(name: str) -> str | None:
    """The way to do without a flag of ms-swift that is not here ("" if there is nothing); None for a name
    that is none of ms-swift's.
    """
    return NOT_BUILT.get(name)
