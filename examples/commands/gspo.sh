#!/usr/bin/env bash
# GSPO: GRPO whose importance ratio and clip are those of the whole completion. One GPU.
raytune-rl rlhf \
    --rlhf_type grpo \
    --importance_sampling_level sequence \
    --epsilon 3e-4 \
    --epsilon_high 4e-4 \
    --beta 0 \
    --model Qwen/Qwen2.5-7B-Instruct \
    --dataset AI-MO/NuminaMath-TIR \
    --system examples/prompt.txt \
    --reward_funcs accuracy format \
    --train_type lora \
    --torch_dtype bfloat16 \
    --sleep_level 1 \
    --vllm_gpu_memory_utilization 0.5 \
    --max_completion_length 2048 \
    --num_generations 8 \
    --per_device_train_batch_size 16 \
    --steps_per_generation 4 \
    --learning_rate 1e-5 \
    --temperature 1.0 \
    --max_steps 300 \
    --output_dir output
