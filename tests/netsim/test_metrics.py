from __future__ import annotations

import pytest

from netsim import metrics as metrics_module
from netsim.metrics import STATISTICS, Metrics, percentile


@pytest.mark.parametrize(("share", "expected"), [(0.01, 1.0), (0.5, 5.0), (0.51, 6.0), (0.99, 10.0), (1.0, 10.0)])
def test_a_percentile_is_the_nearest_rank(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(1, 11)], share) == expected


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def test_observations_become_statistics() -> None:
    metrics = Metrics()
    for value in (3.0, 1.0, 2.0):
        metrics.observe("lookup_s", value)
    numbers = metrics.numbers()
    assert {name.rpartition(".")[2] for name in numbers} == set(STATISTICS)
    assert [numbers[f"lookup_s.{name}"] for name in STATISTICS] == [3, 2.0, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_what_was_expected_and_never_observed_has_a_count_of_nothing_and_no_percentiles() -> None:
    metrics = Metrics()
    metrics.expect("lookup_s")
    assert metrics.numbers() == {"lookup_s.count": 0}


def test_counts_add_up_and_put_replaces() -> None:
    metrics = Metrics()
    metrics.count("found", 0)
    metrics.count("found")
    metrics.count("found", 2)
    metrics.put("share", 0.5)
    metrics.put("share", 0.25)
    assert metrics.numbers() == {"found": 3, "share": 0.25}


def test_a_bound_that_broke_names_whose_value_it_was() -> None:
    metrics = Metrics()
    metrics.observe("lookup_s", 2.0, of="home-2")
    metrics.observe("lookup_s", 9.0, of="home-9")
    metrics.observe("lookup_s", 1.0, of="home-1")
    metrics.count("lost", of="home-4")
    assert metrics.culprits("lookup_s.p99", too_high=True) == ("home-9",)
    assert metrics.culprits("lookup_s.min", too_high=False) == ("home-1",)
    assert metrics.culprits("lost", too_high=True) == ("home-4",)
    assert metrics.culprits("unknown", too_high=True) == ()


def test_a_number_that_is_too_low_names_all_who_still_owe_it_something() -> None:
    metrics = Metrics()
    for name in ("joined", "contacts", "join_s"):
        metrics.owed_by(name, ["home-0"])
        metrics.owed_by(name, ["home-1", "home-2", "home-3"])
    metrics.gave("joined", "home-2")
    metrics.gave("never heard of", "home-2")
    metrics.put("joined", 1, of="home-9")
    metrics.observe("contacts", 4, of="home-2")
    assert metrics.culprits("joined", too_high=False) == ("home-1", "home-3")
    assert metrics.culprits("joined", too_high=True) == ("home-9",)
    for statistic in ("contacts.min", "join_s.p99"):
        assert metrics.culprits(statistic, too_high=False) == ("home-1", "home-2", "home-3")
    metrics.gave("joined", "home-1")
    metrics.gave("joined", "home-3")
    assert metrics.culprits("joined", too_high=False) == ("home-9",)


def test_series_keep_their_points_in_order() -> None:
    metrics = Metrics()
    metrics.sample("alive", 1.0, 10)
    metrics.sample("alive", 2.0, 9)
    assert metrics.series()["alive"].times_s == (1.0, 2.0)
    assert metrics.series()["alive"].values == (10.0, 9.0)


def test_what_is_over_the_bounds_is_counted_as_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "OBSERVATIONS_AT_MOST", 2)
    monkeypatch.setattr(metrics_module, "SERIES_POINTS_AT_MOST", 1)
    metrics = Metrics()
    for value in range(3):
        metrics.observe("a", value)
        metrics.sample("b", value, value)
    assert metrics.dropped == 3
    assert metrics.numbers()["a.count"] == 2
