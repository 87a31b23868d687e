"""Which tokens stand in a range of characters, found by halving, beside what all tokens' places say."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from raytune_rl.data.encode_rows import _mask, _mask_by_search, _starts_by_offsets
from raytune_rl.errors import DataError

CORPUS = [
    "the model answers in words, and in figures: 12 + 30 = 42",
    "Grüße aus Köln, naïve café; Ünïcödé e\u0301 o\u0308",
    "🤖 says 👩‍👩‍👧 and 日本語 and नमस्ते",
    "tabs\tand\n\nlines  and   spaces ",
]


def byte_level() -> Tokenizer:
    """As Qwen's and Llama 3's: a character of several bytes may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:1], trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2's and Gemma's: spaces become a sign, unknown characters bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilmnorstuw", "▁the", "in"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("i", "n")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT's: accents and white space vanish."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def outcome(mask: Any) -> list[bool] | None:
    """What it gives; None for an error of the row."""
    try:
        found: list[bool] = mask().tolist()
    except DataError:
        return None
    return found


@pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece])
def test_it_is_what_all_places_say(make: Any) -> None:
    tokenizer, draw, masks = make(), random.Random(0), 0
    for text in [*CORPUS, "".join(CORPUS), "  leading", "x", ""]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        for _ in range(200):
            ends = sorted(draw.choices(range(len(text) + 1), k=4))
            ranges = [(ends[0], ends[1]), (ends[2], ends[3])]
            wanted = outcome(lambda: _mask(_starts_by_offsets(places, ranges), ranges))  # noqa: B023
            found = outcome(lambda: _mask_by_search(encoding, len(places), ranges))  # noqa: B023
            assert found == wanted, (text, ranges)
            masks += found is not None and any(found)
    assert masks > 100
