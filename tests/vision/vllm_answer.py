"""Run as a program: what vLLM samples for a picture, as JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main(model: str, picture: str, prompt: str) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    request = {"prompt": prompt, "multi_modal_data": {"image": Image.open(picture)}}
    answer = engine.generate(
        [request], SamplingParams(temperature=0, max_tokens=6, logprobs=0), use_tqdm=False
    )[0]
    tokens = list(answer.outputs[0].token_ids)
    logprobs = [step[token].logprob for step, token in zip(answer.outputs[0].logprobs, tokens, strict=True)]
    print(json.dumps({"prompt": list(answer.prompt_token_ids), "tokens": tokens, "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
