"""A head tied to the embedding in models to which vLLM gives two matrices whatever the configuration says
(OLMoE, GLM-4 MoE, GPT-OSS, DeepSeek, Qwen3-Next): their checkpoints have one, and vLLM would sample from a
head that was never loaded. The embedding is loaded a second time, as the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class HeadApart:
    """The two matrices of a tied head.

    Attributes:
        embedding, head: vLLM's names of their weights.
        vllm_name: Of a weight by its name in the checkpoint; None where vLLM has no use for it.
    """

    embedding: str
    head: str
    vllm_name: Callable[[str], str | None] = str


def with_tied_head(
    weights: Iterable[tuple[str, Tensor]], apart: HeadApart | None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, and a head behind them if vLLM's model wants one that they do not have.

    Args:
        weights: By their names in the checkpoint.
        apart: From `head_apart`.
    """
    shared: Tensor | None = None
    has_head = False
    for name, tensor in weights:
        if apart is not None:
            vllm_name = apart.vllm_name(name)
            has_head |= vllm_name == apart.head
            shared = tensor if vllm_name == apart.embedding else shared
        yield name, tensor
    if apart is not None and shared is not None and not has_head:
        yield apart.head, shared


def load_tied_heads() -> None:
    """From now on the models that this process reads from files get such a head too."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    plain = DefaultModelLoader.get_all_weights
    if hasattr(plain, "__wrapped__"):
        return

    @wraps(plain)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        apart = head_apart(model, model_config.hf_config)
        return with_tied_head(plain(self, model_config, model), apart)

    DefaultModelLoader.get_all_weights = get_all_weights


def head_apart(model: nn.Module, config: Any) -> HeadApart | None:
    """The two matrices, where the configuration ties them and vLLM does not; else None.

    Args:
        model: vLLM's.
        config: Transformers' configuration of the model.
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
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    apart = HeadApart(f"{name}.weight", f"{head_name}.weight", str if mapper is None else mapper.map_name)
    return apart if apart.vllm_name(apart.head) == apart.head else None
