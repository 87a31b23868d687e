#!/usr/bin/env bash
# DPO by LoRA on rows such as {"messages": [..., {"role": "assistant", ...}], "rejected_response": "..."}, eight GPUs.
# The reference is the model before its first step: no second copy is loaded. Other algorithms: --rlhf_type simpo,
# orpo, cpo, rm; kto on rows with "label": true or false. A mixture as in MPO: --loss_type sigmoid bco_pair sft
# --loss_weights 0.8 0.2 1.
raytune-rl rlhf \
    --rlhf_type dpo \
    --model Qwen/Qwen2.5-7B-Instruct \
    --dataset pairs.jsonl \
    --split_dataset_ratio 0.01 \
    --train_type lora \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --torch_dtype bfloat16 \
    --attn_impl flash_attn \
    --deepspeed zero2 \
    --policy_workers 8 \
    --beta 0.1 \
    --rpo_alpha 0.1 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 2 \
    --learning_rate 1e-4 \
    --warmup_ratio 0.05 \
    --max_length 2048 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --output_dir output
