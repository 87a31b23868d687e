"""A head tied to the embedding in models to which vLLM gives two matrices whatever the configuration says
(OLMoE, GLM-4 MoE, GPT-OSS, DeepSeek, Qwen3-Next): their checkpoints have one, and vLLM would sample from a
head that was never loaded. The embedding is loaded a second time, as the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import wraps
from typing import Any

from torch import Tensor, nn


def with_tied_head(
    weights: Iterable[tuple[str, Tensor]], names: tuple[str, str] | None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, and a head behind them if vLLM's model wants one that they do not have.

    Args:
        weights: By their names in the checkpoint.
        names: Of embedding and head, from `head_apart`.
    """
    embedding, head = names or ("", "")
    shared: Tensor | None = None
    for name, tensor in weights:
        if name == embedding:
            shared = tensor
        elif name == head:
            head = ""
        yield name, tensor
    if shared is not None and head:
        yield head, shared


def load_tied_heads() -> None:
    """From now on the models that this process reads from files get such a head too."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    plain = DefaultModelLoader.get_all_weights
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        names = head_apart(model, model_config.hf_config)
        return with_tied_head(plain(self, model_config, model), names)

    DefaultModelLoader.get_all_weights = get_all_weights


def head_apart(model: nn.Module, config: Any) -> tuple[str, str] | None:
    """Names of embedding's and head's weights where the configuration ties them and vLLM has two; else None.

    Only for models whose weights vLLM calls as their checkpoints do; for others the guard has to find it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return None
    layers = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)]
    heads = [(n, layer) for n, layer in layers if isinstance(layer, ParallelLMHead)]
    embeddings = [(n, layer) for n, layer in layers if not isinstance(layer, ParallelLMHead)]
    if len(heads) != 1 or len(embeddings) != 1:
        return None
    (head_name, head), (name, embedding) = heads[0], embeddings[0]
    if head.weight is embedding.weight or head.weight.data_ptr() == embedding.weight.data_ptr() != 0:
        return None
    return f"{name}.weight", f"{head_name}.weight"
