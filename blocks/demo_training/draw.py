"""A small seeded generator for the corpus: the same draws on every platform and Python version.

Splitmix64 (Steele, Lea, Flood 2014) on a counter. It must not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# A favourite and a runner-up keep the trained logits confident: a uniform choice would be a tie at every slot.
_FAVOURITE_PERCENT = 55
_FAVOURITE_OF_TWO_PERCENT = 70
_RUNNER_UP_PERCENT = 80  # the favourite's share included


class Draw:
    """A stream of draws, keyed by a seed and a stream number."""

    __slots__ = ("_state",)

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._state = (seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D) & _MASK
        self.bits()

    def bits(self) -> int:
        """Returns the next 64 bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def below(self, bound: int) -> int:
        """Returns a number in ``[0, bound)``; the bias of the product is far below what a corpus can show."""
        return (self.bits() * bound) >> 64

    def chance(self, percent: int) -> bool:
        """Returns true in that many of a hundred draws."""
        return self.below(100) < percent

    def even(self, options: Sequence[T]) -> T:
        """Picks one option, all being equally likely."""
        return options[self.below(len(options))]

    def pick(self, options: Sequence[T]) -> T:
        """Picks the first option more than half of the time, the second a quarter, else any of the rest."""
        roll = self.below(100)
        if len(options) < 3:
            return options[0] if roll < _FAVOURITE_OF_TWO_PERCENT else options[-1]
        if roll < _FAVOURITE_PERCENT:
            return options[0]
        if roll < _RUNNER_UP_PERCENT:
            return options[1]
        return options[2 + self.below(len(options) - 2)]
