"""Philox against its published answers, and the two ways of asking for words against each other."""

import numpy as np
import pytest

from blocks.model.counter_random import philox, words_at, words_below

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    one, two, three, four = (np.array([int(word, 16)], dtype=np.uint64) for word in counter.split())
    key_low, key_high = (int(word, 16) for word in key.split())
    words = philox((one, two, three, four), key_low | key_high << 32)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == answer


def test_some_words_are_the_same_as_those_among_all() -> None:
    place = {"seed": 12345, "choice": 3, "position": 77}
    indices = np.array([0, 1, 2, 3, 4, 501, 998, 7])
    assert words_at(indices, **place).tolist() == words_below(999, **place)[indices].tolist()
    assert len(words_below(999, **place)) == 999


def test_the_words_of_a_place_never_change() -> None:
    assert words_below(5, seed=1, choice=0, position=0).tolist() == PINNED
    assert (
        words_below(5, seed=-1, choice=0, position=0).tolist()
        == words_below(5, seed=(1 << 64) - 1, choice=0, position=0).tolist()
    )


def test_every_part_of_the_place_matters() -> None:
    base = {"seed": 1, "choice": 0, "position": 0}
    streams = [
        base,
        {**base, "seed": 2},
        {**base, "seed": 1 + (1 << 32)},
        {**base, "choice": 1},
        {**base, "position": 1},
    ]
    assert len({tuple(words_below(8, **stream).tolist()) for stream in streams}) == len(streams)


PINNED = [3823634032, 3842641596, 2515673792, 3054873127, 2886210587]
