"""Shares of work: in proportion to measured speed, newcomers soon but not flooded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from routing.spread import Spread
from tests.routing.servers import server


def test_work_is_shared_in_proportion_to_announced_speed() -> None:
    servers = [server("fast", "0:4", step_s=0.001), server("slow", "0:4", step_s=0.003)]
    spread = Spread()
    got = Counter(spread.choose(servers, 0, 4, 16).peer for _ in range(400))
    assert abs(got[servers[0].peer] - 300) <= 2


def test_what_was_measured_counts_more_than_what_was_announced() -> None:
    liar, honest = server("liar", "0:4", step_s=0.0001), server("honest", "0:4", step_s=0.001)
    spread = Spread()
    for _ in range(40):
        spread.took(liar, 16, 4, 16 * 4 * 0.01)
        spread.took(honest, 16, 4, 16 * 4 * 0.001)
    got = Counter(spread.choose([liar, honest], 0, 4, 16).peer for _ in range(110))
    assert abs(got[honest.peer] - 100) <= 2


def test_a_newcomer_enters_at_the_least_of_the_others() -> None:
    old, new = server("old", "0:4", step_s=0.001), server("new", "0:4", step_s=0.001)
    spread = Spread()
    for _ in range(100):
        spread.choose([old], 0, 4, 16)
    got = Counter(spread.choose([old, new], 0, 4, 16).peer for _ in range(20))
    assert got == {old.peer: 10, new.peer: 10}


def test_one_that_was_away_is_not_flooded_with_what_it_missed() -> None:
    steady, away = server("steady", "0:4", step_s=0.001), server("away", "0:4", step_s=0.001)
    spread = Spread()
    for _ in range(10):
        spread.choose([steady, away], 0, 4, 16)
    for _ in range(1000):
        spread.choose([steady], 0, 4, 16)
    got = Counter(spread.choose([steady, away], 0, 4, 16).peer for _ in range(20))
    assert abs(got[away.peer] - 10) <= 1


def test_of_equals_the_one_that_goes_further_is_taken() -> None:
    short, long = server("a", "0:2", step_s=0.001), server("b", "0:4", step_s=0.001)
    assert Spread().choose([short, long], 0, 4, 16) is long


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 200))
def test_nobody_waits_for_ever(speeds: list[int], rounds: int) -> None:
    servers = [server(f"s{index}", "0:4", step_s=0.001 * speed) for index, speed in enumerate(speeds)]
    spread = Spread()
    got = Counter(spread.choose(servers, 0, 4, 16).peer for _ in range(rounds * len(servers) * 9))
    assert all(got[found.peer] >= rounds for found in servers)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 120))
def test_the_round_robin_is_weighted_and_interleaved_at_every_moment(weights: list[int], count: int) -> None:
    """Nobody is ever further ahead of another than the one micro-batch that it was given last: SWARM's rule."""
    servers = [server(f"s{index}", "0:4", step_s=1.0 / weight) for index, weight in enumerate(weights)]
    spread, got = Spread(), Counter[bytes]()
    for _ in range(count):
        got[spread.choose(servers, 0, 4, 16).peer] += 1
        busy = [got[found.peer] / weight for found, weight in zip(servers, weights, strict=True)]
        last = [(got[found.peer] - 1) / weight for found, weight in zip(servers, weights, strict=True)]
        assert max(last) <= min(busy) + 1e-9
