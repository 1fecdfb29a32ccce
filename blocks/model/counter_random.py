"""Counter-based random words: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

A draw is a pure function of its key and its place, so that a replay, another machine or another batch draws the same. Integer
arithmetic only, independent of every generator in numpy and torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD_MASK = 0xFFFFFFFF
_WORD = np.uint64(32)
_LOW = np.uint64(_WORD_MASK)

Words = npt.NDArray[np.uint64]


def philox(counters: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Encrypts counters, four 32-bit words each (held in uint64), with a 64-bit key."""
    one, two, three, four = counters
    key_low, key_high = key & _WORD_MASK, (key >> 32) & _WORD_MASK
    for _ in range(_ROUNDS):
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]
        one, two, three, four = (
            (right >> _WORD) ^ two ^ np.uint64(key_low),
            right & _LOW,
            (left >> _WORD) ^ four ^ np.uint64(key_high),
            left & _LOW,
        )
        key_low, key_high = (key_low + _WEYL[0]) & _WORD_MASK, (key_high + _WEYL[1]) & _WORD_MASK
    return one, two, three, four


def words_at(indices: npt.NDArray[np.int64], *, seed: int, choice: int, position: int) -> npt.NDArray[np.uint32]:
    """Returns one 32-bit word per index: word ``index % 4`` of the block ``index // 4`` of (choice, position)."""
    unsigned = indices.astype(np.uint64)
    places, inverse = np.unique(unsigned >> np.uint64(2), return_inverse=True)
    return _block_words(places, seed, choice, position)[inverse, (unsigned & np.uint64(3)).astype(np.int64)]


def words_below(bound: int, *, seed: int, choice: int, position: int) -> npt.NDArray[np.uint32]:
    """Returns the words of the indices 0 to ``bound - 1``: `words_at` for all of them, in a quarter of the work."""
    places = np.arange((bound + 3) // 4, dtype=np.uint64)
    return _block_words(places, seed, choice, position).reshape(-1)[:bound]


def _block_words(places: Words, seed: int, choice: int, position: int) -> npt.NDArray[np.uint32]:
    constant = np.ones_like(places)
    counters = (
        places,
        constant * np.uint64(position & _WORD_MASK),
        constant * np.uint64(choice & _WORD_MASK),
        constant * np.uint64(0),
    )
    words = philox(counters, seed & ((1 << 64) - 1))
    return np.stack(words, axis=-1).astype(np.uint32)
