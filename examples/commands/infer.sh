#!/usr/bin/env bash
# Talks with what was trained; with --val_dataset it answers a file. Put in your checkpoint.
raytune-rl infer \
    --adapters output/checkpoint-xxx \
    --max_new_tokens 512
