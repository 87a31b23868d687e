"""The seeds of completions: each its own, by where it is in the run.

A seed is the first word of numpy's `SeedSequence` of (the run's seed, batch, prompt, sample) and, for a
prompt that is in the batch again, how often it was before. Making the object takes 10 microseconds a
completion; its hash (O'Neill, "Developing a seed_seq alternative", 2015; numpy/random/bit_generator.pyx) is
written out here for many entropies at once. Where numbers exceed 32 bits, numpy does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
MIX_L, MIX_R = 0xCA01F9DD, 0x4973F715
POOL, SHIFT, WORD = 4, np.uint32(16), 2**32
SEED_BITS = 0x7FFFFFFF
"""vLLM takes seeds of 31 bits."""


def sample_seed(seed: int, batch: int, prompt: int, sample: int) -> int:
    """A completion's own seed: a repeated batch, on any worker, samples the same."""
    return int(np.random.SeedSequence((seed, batch, prompt, sample)).generate_state(1)[0] & SEED_BITS)


def row_seeds(seed: int, batch: int, rows: Sequence[int], completions: int) -> list[tuple[int, ...]]:
    """The seeds of the completions of each prompt of a batch. One that is in it again, as across the border
    of an epoch, has others.
    """
    before: Counter[int] = Counter()
    again = []
    for row in map(int, rows):
        again.append(before[row])
        before[row] += 1
    numbers = np.array(again, dtype=np.int64)
    entropy = np.empty((len(again), completions, 5), dtype=np.int64)
    entropy[..., 0], entropy[..., 1] = seed, batch
    entropy[..., 2] = np.asarray(rows, dtype=np.int64).reshape(-1, 1)
    entropy[..., 3], entropy[..., 4] = np.arange(completions), numbers[:, None]
    words = np.empty((len(again), completions), dtype=np.int64)
    words[numbers == 0] = first_words(entropy[numbers == 0][..., :4])
    words[numbers > 0] = first_words(entropy[numbers > 0])
    return [tuple(row) for row in (words & SEED_BITS).tolist()]


def first_words(entropy: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first word that `SeedSequence` makes of each entropy.

    Args:
        entropy: `[..., n]`, n numbers from 0 each.
    """
    if entropy.size and entropy.max() >= WORD:
        flat = entropy.reshape(-1, entropy.shape[-1])
        words = [np.random.SeedSequence(one.tolist()).generate_state(1)[0] for one in flat]
        return np.array(words, dtype=np.int64).reshape(entropy.shape[:-1])
    given = [entropy[..., i].astype(np.uint32) for i in range(entropy.shape[-1])]
    zero = np.zeros(entropy.shape[:-1], np.uint32)
    constant = INIT_A

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * MULT_A % WORD
        value = value * np.uint32(constant)
        return value ^ (value >> SHIFT)

    def mixed(x: NDArray[np.uint32], y: NDArray[np.uint32]) -> NDArray[np.uint32]:
        value = np.uint32(MIX_L) * x - np.uint32(MIX_R) * y
        return value ^ (value >> SHIFT)

    pool = [hashed(given[i] if i < len(given) else zero) for i in range(POOL)]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for extra in given[POOL:]:
        for target in range(POOL):
            pool[target] = mixed(pool[target], hashed(extra))
    word = (pool[0] ^ np.uint32(INIT_B)) * np.uint32(INIT_B * MULT_B % WORD)
    return (word ^ (word >> SHIFT)).astype(np.int64)
