"""Which long answers a holder has under way, and whether another one may go. Pure.

A node nearest to a busy key can be asked for more than its uplink carries. What it answers then waits in sockets until nobody waits for
it any more, and the askers ask others for the same. So a holder that has as much under way as leaves in a moment says when to ask again,
and the asker goes to the next holder. How fast answers arrive is measured by those that did: no uplink has to be known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from overlay.dht import limits

GOLDEN = 0.618033988749895
"""Its multiples, modulo 1, lie as far apart as they can."""


@dataclass(frozen=True, slots=True)
class _Answer:
    asker: bytes
    size_bytes: int


class AnswersUnderWay:
    """Answers from `limits.LONG_ANSWER_BYTES` on: written, and not known to have arrived. ``now`` is in seconds of any monotonic clock.

    An ``asker`` is a peer, or all those of one address group: identities are free.
    """

    def __init__(self) -> None:
        self._answers: dict[int, _Answer] = {}
        self._serial = 0
        self._bytes = 0
        self._began_at = float("-inf")
        self._arrived_bytes = 0.0
        """Forgotten exponentially, with `limits.ARRIVED_LATELY_S`."""
        self._arrived_at = float("-inf")
        self._put_off = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def put_off(self) -> int:
        """How many askers were told to ask again."""
        return self._put_off

    def later_s(self, asker: bytes, size_bytes: int, now: float) -> float:
        """After how many seconds ``asker`` should ask again for an answer of that size; 0 where it may go now.

        One that goes may be as long as it likes: were it measured by what is left, newcomers, who ask for all, would wait for ever.
        """
        if size_bytes < limits.LONG_ANSWER_BYTES or self._has_room(asker, now):
            return 0.0
        self._put_off += 1
        spread = 0.75 + 0.5 * (GOLDEN * self._put_off % 1.0)  # those put off at one moment come back one by one
        later_s = spread * self._bytes / max(self._rate(now), limits.ARRIVES_BYTES_PER_S)
        return min(limits.LATER_MAX_S, max(limits.LATER_MIN_S, later_s))

    def _has_room(self, asker: bytes, now: float) -> bool:
        of_asker = sum(1 for answer in self._answers.values() if answer.asker == asker)
        if not of_asker and now - self._began_at >= limits.LONG_ANSWER_EVERY_S:
            return True
        has_place = len(self._answers) < limits.LONG_ANSWERS_MAX and of_asker < limits.LONG_ANSWERS_PER_ASKER
        return has_place and self._bytes < max(limits.UNDER_WAY_BYTES, self._rate(now) * limits.UNDER_WAY_S)

    def began(self, asker: bytes, size_bytes: int, now: float) -> int:
        """An answer was written; returns what `ended` wants to hear."""
        self._serial += 1
        self._answers[self._serial] = _Answer(asker, size_bytes)
        self._bytes += size_bytes
        self._began_at = now
        return self._serial

    def ended(self, serial: int, now: float, *, has_arrived: bool) -> None:
        """Nothing of it is under way any more; it ``has_arrived``, or a part was dropped."""
        answer = self._answers.pop(serial)
        self._bytes -= answer.size_bytes
        if has_arrived:
            self._arrived_bytes = self._lately(now) + answer.size_bytes
            self._arrived_at = now

    def _rate(self, now: float) -> float:
        """Bytes a second, of late."""
        return self._lately(now) / limits.ARRIVED_LATELY_S

    def _lately(self, now: float) -> float:
        return self._arrived_bytes * math.exp((self._arrived_at - now) / limits.ARRIVED_LATELY_S)
