"""A head that the configuration ties and vLLM does not is loaded from the embedding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from raytune_rl.workers.vllm_tied import HeadApart, head_apart, with_tied_head

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
APART = HeadApart(EMBEDDING, HEAD)


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def test_the_embedding_comes_once_more_as_the_head() -> None:
    given = weights(EMBEDDING, "model.norm.weight")
    made = list(with_tied_head(given.items(), APART))
    assert [name for name, _ in made] == [*given, HEAD]
    assert made[-1][1] is given[EMBEDDING]


def test_the_embedding_is_known_by_vllms_name_for_it() -> None:
    apart = HeadApart("model.embedding.weight", HEAD, lambda name: name.replace("embed_tokens", "embedding"))
    made = list(with_tied_head(weights(EMBEDDING).items(), apart))
    assert [name for name, _ in made] == [EMBEDDING, HEAD]


@pytest.mark.parametrize(
    ("apart", "given"),
    [
        (None, weights(EMBEDDING)),  # vLLM ties it, or nobody does
        (APART, weights(EMBEDDING, HEAD)),  # the files have both
        (APART, weights(HEAD, EMBEDDING)),
        (APART, weights("model.norm.weight")),
    ],
)
def test_nothing_else_is_added(apart: HeadApart | None, given: dict[str, torch.Tensor]) -> None:
    assert list(with_tied_head(given.items(), apart)) == list(given.items())


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_only_a_tied_head_of_its_own_matrix_is_apart(
    ties: bool, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import vocab_parallel_embedding

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2))

    class Head(Embedding):
        pass

    monkeypatch.setattr(vocab_parallel_embedding, "VocabParallelEmbedding", Embedding)
    monkeypatch.setattr(vocab_parallel_embedding, "ParallelLMHead", Head)
    model: Any = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens, model.lm_head = Embedding(), Head()
    if shares:
        model.lm_head.weight = model.model.embed_tokens.weight
    text = SimpleNamespace(tie_word_embeddings=ties)
    found = head_apart(model, SimpleNamespace(get_text_config=lambda: text))
    assert found == (APART if ties and not shares else None)
