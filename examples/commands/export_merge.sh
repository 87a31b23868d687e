#!/usr/bin/env bash
# Writes <checkpoint>-merged: the base model with the adapter merged into it. Put in your checkpoint.
raytune-rl export \
    --adapters output/checkpoint-xxx \
    --merge_lora true
