#!/usr/bin/env bash
# DAPO on a language model, eight GPUs that policy and engines share. --rlhf_type dapo stands for --loss_type dapo,
# --epsilon_high 0.28, --beta 0, --dynamic_sample true and --overlong_filter true; say any of them to change it.
raytune-rl rlhf \
    --rlhf_type dapo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --dataset AI-MO/NuminaMath-TIR \
    --system examples/prompt.txt \
    --reward_funcs accuracy soft_overlong \
    --soft_cache_length 512 \
    --max_completion_length 4096 \
    --max_resample_times 3 \
    --train_type full \
    --deepspeed zero2 \
    --torch_dtype bfloat16 \
    --attn_impl flash_attn \
    --policy_workers 8 \
    --sleep_level 1 \
    --vllm_gpu_memory_utilization 0.5 \
    --num_generations 16 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 4 \
    --steps_per_generation 16 \
    --rollout_importance_sampling_mode token_truncate \
    --learning_rate 1e-6 \
    --temperature 1.0 \
    --max_steps 300 \
    --logging_steps 1 \
    --log_completions true \
    --output_dir output
