"""The corpus generator's draws: pinned, in range, and with a clear favourite."""

from collections import Counter

import pytest

from blocks.demo_training.draw import Draw


def test_the_draws_never_change() -> None:
    draw = Draw(1, 2)
    assert [draw.below(1000) for _ in range(8)] == PINNED


def test_streams_of_one_seed_differ() -> None:
    assert (
        len({Draw(1, stream).bits() for stream in range(1000)} | {Draw(2, stream).bits() for stream in range(1000)})
        == 2000
    )


@pytest.mark.parametrize(("count", "shares"), [(1, [1.0]), (2, [0.7, 0.3]), (5, [0.55, 0.25, 0.067, 0.067, 0.067])])
def test_the_first_option_is_the_clear_favourite(count: int, shares: list[float]) -> None:
    draw = Draw(3)
    counts = Counter(draw.pick(range(count)) for _ in range(5000))
    for option, share in enumerate(shares):
        assert counts[option] / 5000 == pytest.approx(share, abs=0.03)


def test_an_even_draw_reaches_every_option_alike() -> None:
    draw = Draw(4)
    counts = Counter(draw.even("abcd") for _ in range(8000))
    assert all(counts[option] == pytest.approx(2000, abs=200) for option in "abcd")


PINNED = [239, 215, 128, 13, 575, 306, 979, 277]
