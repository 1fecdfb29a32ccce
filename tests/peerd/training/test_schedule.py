from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerd.training.schedule import learning_rate


@given(st.integers(1, 200), st.integers(0, 300), st.sampled_from(["linear", "constant"]))
def test_the_rate_rises_to_the_peak_and_never_past_it(steps: int, warmup: int, schedule: str) -> None:
    rates = [learning_rate(step, steps=steps, peak=0.5, warmup=warmup, schedule=schedule) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    top = max(0, min(warmup, steps) - 1)
    assert rates[top] == 0.5
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_linear_ends_near_nothing_and_constant_stays() -> None:
    assert learning_rate(99, steps=100, peak=1.0, warmup=0, schedule="linear") == 0.01
    assert learning_rate(99, steps=100, peak=1.0, warmup=10, schedule="constant") == 1.0
