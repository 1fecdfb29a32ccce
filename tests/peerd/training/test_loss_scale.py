from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerd.training.loss_scale import FIRST, GROW_AFTER, LARGEST, SMALLEST, LossScale


@given(st.lists(st.booleans(), max_size=60), st.sampled_from(["float32", "bfloat16"]))
def test_types_with_range_enough_are_never_scaled(taken: list[bool], dtype: str) -> None:
    scale = LossScale.of(dtype)
    for each in taken:
        scale = scale.after(each)
    assert scale.value == 1.0


def test_the_scale_halves_at_once_and_doubles_after_many_steps_that_were_taken() -> None:
    scale = LossScale.of("float16")
    assert scale.value == FIRST
    scale = scale.after(False)
    assert scale.value == FIRST / 2
    for _ in range(GROW_AFTER - 1):
        scale = scale.after(True)
    assert scale.value == FIRST / 2
    assert scale.after(True).value == FIRST
    assert scale.after(False).after(True).value == FIRST / 4


@given(st.lists(st.sampled_from([False, True, None]), max_size=80))
def test_the_scale_is_a_power_of_two_within_its_bounds(steps: list[bool | None]) -> None:
    scale = LossScale.of("float16")
    for step in steps:
        for _ in range(GROW_AFTER if step is None else 1):
            scale = scale.after(step is not False)
        assert SMALLEST <= scale.value <= LARGEST
        assert scale.value.hex().startswith("0x1.0000000000000p")


@given(st.lists(st.booleans(), max_size=300))
def test_a_scale_survives_a_checkpoint(taken: list[bool]) -> None:
    scale = LossScale.of("float16")
    for each in taken:
        scale = scale.after(each)
    assert LossScale.of("float16").restored(scale.document()) == scale
