"""By how much the loss is scaled before backward, so that small gradients survive float16.

Pure. Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", 2018, section 3.2): halved by a step whose gradients are not
finite, doubled after `GROW_AFTER` that were. Scales are powers of two: where nothing over- or underflows they change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HALF = "float16"
SMALLEST, FIRST, LARGEST = 2.0**-14, 2.0**10, 2.0**16
GROW_AFTER = 200
"""Steps that were taken at one scale."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """The scale of the next step, and how many were taken at it. ``dynamic`` is False where the type has range enough."""

    value: float = 1.0
    taken: int = 0
    dynamic: bool = False

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """Where training in this type begins."""
        return cls(FIRST, 0, True) if dtype == HALF else cls()

    def after(self, taken: bool) -> LossScale:
        """What follows a step; ``taken`` is False where its gradients were not finite."""
        if not self.dynamic:
            return self
        if not taken:
            return LossScale(max(SMALLEST, self.value / 2), 0, True)
        if self.taken + 1 < GROW_AFTER:
            return LossScale(self.value, self.taken + 1, True)
        return LossScale(min(LARGEST, self.value * 2), 0, True)

    def document(self) -> list[float]:
        """As a checkpoint holds it."""
        return [self.value, self.taken]

    def restored(self, document: Sequence[float]) -> LossScale:
        """This one as it was when `document` was written. Raises ValueError, TypeError."""
        value, taken = document
        return LossScale(float(value), int(taken), self.dynamic)
