"""One family, one way of publishing: the largest gap of log-probs after each weight version."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from raytune_rl.data.chat import ChatTemplate
from raytune_rl.data.collate import collate
from raytune_rl.data.example import Message
from raytune_rl.models.load import load_config, load_model, load_tokenizer
from raytune_rl.models.scorer import TokenScorer
from raytune_rl.models.traits import has_experts, recurrent, wants_bfloat16
from raytune_rl.models.tuner import apply_tuner
from raytune_rl.models.weights import WeightExporter, whole
from raytune_rl.protocol.model import TunerSettings
from raytune_rl.protocol.rollout import EngineSpec, Sampling
from raytune_rl.protocol.weights import Manifest
from raytune_rl.runtime.cluster import NAMESPACE
from raytune_rl.runtime.weights import start_store
from raytune_rl.workers.engine_loop import EngineLoop
from raytune_rl.workers.engine_prompt import Ask, EnginePrompt
from raytune_rl.workers.publishing import Publisher, adapter_config
from raytune_rl.workers.vllm_engine import VllmEngine

VERSIONS = 3
COMPLETIONS, TOKENS = 6, 12
MOVE = 0.03
"""Standard deviation of what is added to every trained weight between versions; adapters get four times
that."""


@dataclass(frozen=True)
class Job:
    """The job: `mode` is full, merged, adapter or experts (an adapter on the experts too, merged)."""

    family: str
    tied: bool
    mode: str

    @property
    def name(self) -> str:
        """For people and for files."""
        return f"{self.family}-{'tied' if self.tied else 'untied'}-{self.mode}"


def measure(job: Job, model_dir: Path, address: str) -> dict[str, Any]:
    """Publishes a model three times, moved in between, and compares the engine's log-probs with its own.

    Returns:
        "gaps", one a version, nats; "mode" as it really was; "dtype".
    """
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = str(model_dir)
    config = load_config(path)
    dtype = "bfloat16" if wants_bfloat16(config) else "float32"
    mode = "merged" if job.mode == "adapter" and has_experts(config) else job.mode
    scorer = TokenScorer(_tuned(load_model(path, dtype=dtype).model, mode))
    scorer.verify()
    scorer.eval()
    wire = "merged" if mode == "experts" else mode
    publisher = Publisher(WeightExporter(scorer, wire), whole, 0, 1)  # type: ignore[arg-type]
    index = publisher.index()
    store_name = f"{job.name}-{os.getpid()}"
    store = start_store(store_name)
    spec = EngineSpec(
        path, dtype, 96, store_name, 60, kv_cache_bytes=64 * 2**20, max_num_seqs=8, enforce_eager=True,
        lora_rank=8 if wire == "adapter" else 0, enable_prefix_caching=not recurrent(config),
    )  # fmt: skip
    engine = EngineLoop(lambda: VllmEngine(spec))
    for module in scorer.modules():
        # vLLM puts a __call__ of its own into Transformers' classes, in its own process only: here in ours.
        module.do_not_compile = True  # type: ignore[assignment]
    gaps = []
    for version in range(VERSIONS):
        if version:
            _move(scorer)
        _, *buckets = publisher.publish()
        kind = "adapter" if wire == "adapter" else "full"
        settings = adapter_config(scorer) if wire == "adapter" else None
        refs = tuple(ray.put(bucket) for bucket in buckets)
        ray.get(store.publish.remote(Manifest(version, kind, refs, index, settings)))
        engine.load(version, "drain").result()
        gaps.append(_gap(scorer, engine, _prompt(path), version))
    return {"mode": wire if mode != "experts" else mode, "dtype": dtype, "gaps": gaps}


def _tuned(model: Any, mode: str) -> Any:
    if mode == "full":
        return model
    experts = ()
    if mode == "experts":
        names = (n for n, p in model.named_parameters() if p.ndim == 3 and "conv" not in n)
        experts = tuple(sorted({re.sub(r".*\.\d+\.", "", name) for name in names}))
    settings = TunerSettings(lora_alpha=32, lora_dropout=0.0, target_parameters=experts)
    return apply_tuner(model, settings).model


def _move(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = MOVE * (4 if "lora_" in name else 1)
                parameter.add_(scale * torch.randn_like(parameter))


def _prompt(path: str) -> np.ndarray:
    tokenizer = load_tokenizer(path)
    text = ChatTemplate.of(tokenizer).render([Message("user", "What is 3 + 4?")], generation_prompt=True)
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def _gap(scorer: TokenScorer, engine: EngineLoop[VllmEngine], prompt: np.ndarray, version: int) -> float:
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS)
    seeds = [100 * version + i for i in range(COMPLETIONS)]
    made = engine.sample([Ask(EnginePrompt(prompt, prompt), s, sampling, TOKENS) for s in seeds]).result()
    rows = [np.concatenate([prompt, one.tokens]) for one in made]
    masks = [np.arange(len(row)) >= len(prompt) for row in rows]
    micro = collate(rows, masks, layout="padded", pad_token_id=0)
    with torch.no_grad():
        ours = scorer(
            micro.input_ids, micro.position_ids, micro.attention_mask, micro.predict_index, micro.targets
        ).logprobs.numpy()
    return float(np.abs(ours - np.concatenate([one.logprobs for one in made])).max())
