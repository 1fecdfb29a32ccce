"""The learning rate of a step: a linear warm-up, then level, or linearly down to nothing after the last step. Pure."""

from __future__ import annotations


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate of ``step`` (from 0) of ``steps``; ``schedule`` is ``linear`` or ``constant``.

    The warm-up reaches the peak in its last step; one longer than the run is the run.
    """
    warmup = min(warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (steps - step) / max(1, steps - warmup)
