from __future__ import annotations

import math

import pytest

from netsim.paths import P95_SIGMAS, RTT_SPREAD_MAX, one_way_delay_s
from netsim.scenario import Links

LINKS = Links(rtt_ms=(10.0, 200.0))
PAIRS = [(f"home-{one}", f"home-{other}") for one in range(40) for other in range(one)]


def test_a_path_is_as_long_there_as_back_and_another_for_another_seed_or_pair() -> None:
    there = one_way_delay_s(LINKS, 1, "home-1", "home-2")
    assert there == one_way_delay_s(LINKS, 1, "home-2", "home-1")
    assert (
        len({there, one_way_delay_s(LINKS, 2, "home-1", "home-2"), one_way_delay_s(LINKS, 1, "home-1", "home-3")}) == 3
    )


def test_a_twentieth_of_the_round_trips_lies_beyond_each_end_of_the_range_and_half_beyond_its_geometric_middle() -> (
    None
):
    trips_ms = sorted(2000 * one_way_delay_s(LINKS, 1, one, other) for one, other in PAIRS)
    for below_ms, share in ((10.0, 0.05), (math.sqrt(10.0 * 200.0), 0.5), (200.0, 0.95)):
        assert sum(trip <= below_ms for trip in trips_ms) / len(trips_ms) == pytest.approx(share, abs=0.03)
    most_ms = math.sqrt(10.0 * 200.0) * math.sqrt(20.0) ** (RTT_SPREAD_MAX / P95_SIGMAS)
    assert trips_ms[-1] <= most_ms * (1 + 1e-9)


def test_a_range_of_one_value_is_that_value() -> None:
    links = Links(rtt_ms=(40.0, 40.0))
    assert {round(one_way_delay_s(links, 1, one, other), 12) for one, other in PAIRS[:20]} == {0.02}
