"""The settings of the sampler: what is refused, and in which words."""

import math

import pytest

from blocks.sampling_params import InvalidSampling, SamplingParams


def test_the_defaults_are_greedy_and_need_no_history() -> None:
    params = SamplingParams()
    assert params.is_greedy
    assert not params.has_penalties


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_any_penalty_needs_the_history(field: str) -> None:
    assert SamplingParams(**{field: 1.5}).has_penalties  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", 1 << 64),
        ("seed", -(1 << 63) - 1),
        ("choice", 128),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", None),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidSampling, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.http_status == 400
    assert not caught.value.retryable


def test_the_ends_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=10, top_p=1, top_k=1 << 31, seed=(1 << 64) - 1, choice=127, presence_penalty=-2)
    SamplingParams(seed=-(1 << 63), top_p=1e-9)
