#!/usr/bin/env bash
# Uploads an adapter to ModelScope (--use_hf true: Hugging Face). Put in your names; the token is safer in
# the environment, as MODELSCOPE_API_TOKEN.
raytune-rl export \
    --adapters output/checkpoint-xxx \
    --push_to_hub true \
    --hub_model_id '<your-namespace>/<model-name>' \
    --hub_token '<your-access-token>'
