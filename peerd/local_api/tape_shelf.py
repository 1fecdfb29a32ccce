"""Tapes that clients may come back for: kept by id, within bounds. Pure.

A tape (`peerd.calls.tape`) holds what a backward needs; here it is only something with a size. A backward that went well takes its tape
away: whoever wants another sends everything again, as for a tape that was dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from peerd.calls.tape import Tape
from peerd.decoding import DriverModel
from peerd.local_api.limits import TAPE_LIFE_S, TAPES_BYTES_MAX, TAPES_MAX
from routing.types import Span


@dataclass(frozen=True, slots=True)
class KeptTape:
    """A tape, and what its backward has to fit."""

    model: DriverModel
    span: Span
    shape: tuple[int, ...]  # of the output, and so of its gradient
    tape: Tape


@dataclass(slots=True)
class _Place:
    kept: KeptTape
    size_bytes: int
    expires: float
    users: int = 0


class TapeShelf:
    """Bounded in bytes, number and age: the longest unused go first, and none while it is in use."""

    def __init__(
        self, bytes_max: int = TAPES_BYTES_MAX, count_max: int = TAPES_MAX, life_s: float = TAPE_LIFE_S
    ) -> None:
        self._bytes_max = bytes_max
        self._count_max = count_max
        self._life_s = life_s
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def put(self, name: str, kept: KeptTape, now: float) -> bool:
        """Keep a tape as ``name``; False where there is no room, even after all unused ones are gone."""
        self.expire(now)
        size = kept.tape.size_bytes
        while self.size_bytes + size > self._bytes_max or len(self._places) >= self._count_max:
            unused = next((name for name, place in self._places.items() if not place.users), None)
            if unused is None:
                return False
            self._remove(unused)
        self._places[name] = _Place(kept, size, now + self._life_s)
        self.size_bytes += size
        return True

    @contextmanager
    def borrow(self, name: str, now: float) -> Iterator[KeptTape | None]:
        """A tape for as long as the block lasts, and away with it when the block went well; None when it is gone."""
        self.expire(now)
        place = self._places.get(name)
        if place is None:
            yield None
            return
        place.users += 1
        place.expires = now + self._life_s
        self._places.move_to_end(name)
        try:
            yield place.kept
        finally:
            place.users -= 1
        if self._places.get(name) is place:
            self._remove(name)

    def next_timeout(self) -> float | None:
        """When the longest unused expires."""
        return next((place.expires for place in self._places.values() if not place.users), None)

    def expire(self, now: float) -> None:
        """Drop what is too old."""
        old = [name for name, place in self._places.items() if place.expires <= now and not place.users]
        for name in old:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self.size_bytes -= self._places.pop(name).size_bytes
