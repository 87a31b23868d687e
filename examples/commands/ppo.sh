#!/usr/bin/env bash
# PPO with a trained reward model (raytune-rl rlhf --rlhf_type rm), eight GPUs that policy, critic, engine and reward model
# share; the reference is the policy without its adapter. The critic starts as the reward model. Rewards by functions too:
# --reward_funcs accuracy format --reward_weights 1 1 0.5 (functions first, then models).
raytune-rl rlhf \
    --rlhf_type ppo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --reward_model output/v0-20260101-120000/checkpoint-500 \
    --dataset prompts.jsonl \
    --train_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --attn_impl flash_attn \
    --deepspeed zero2 \
    --policy_workers 8 \
    --colocate true \
    --sleep_level 1 \
    --vllm_gpu_memory_utilization 0.4 \
    --max_completion_length 1024 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --num_ppo_epochs 4 \
    --kl_coef 0.05 \
    --missing_eos_penalty 1 \
    --learning_rate 1e-5 \
    --critic_learning_rate 1e-5 \
    --num_train_epochs 1 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 1 \
    --output_dir output
