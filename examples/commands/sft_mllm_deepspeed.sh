#!/usr/bin/env bash
# LoRA on a vision model, eight GPUs of 17 GB with DeepSpeed ZeRO-2.
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
NPROC_PER_NODE=8 \
MAX_PIXELS=602112 \
nohup raytune-rl sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset 'AI-ModelScope/LaTeX_OCR:human_handwrite' \
    --train_type lora \
    --deepspeed zero2 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --learning_rate 2e-5 \
    --max_length 4096 \
    --num_train_epochs 2 \
    --output_dir output \
    --attn_impl flash_attn
