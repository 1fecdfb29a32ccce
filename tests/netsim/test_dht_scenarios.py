"""The DHT's scenarios in small: the same workloads and checks with few hosts, so that they run with every test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from netsim.outcome import Outcome
from netsim.runner import prepare, run_seed
from netsim.scenario import Fault
from overlay.dht.limits import RECORDS_PER_KEY_MAX

SCENARIOS = Path(__file__).parents[2] / "scenarios"


def small(name: str, homes: int, seed: int = 1, **settings: Any) -> Outcome:
    """One seed of a scenario with so many hosts in `home`, and other settings."""
    prepared = prepare(SCENARIOS / f"{name}.toml")
    hosts: Mapping[str, Any] = {
        **prepared.scenario.hosts,
        "home": replace(prepared.scenario.hosts["home"], count=homes),
    }
    scenario = replace(prepared.scenario, hosts=hosts, channel="null")
    return run_seed(
        replace(prepared, scenario=scenario, settings=replace(prepared.settings, **settings)), seed, is_timed=False
    )


def assert_good(outcome: Outcome, *but: str) -> None:
    """No failure, and every check of the scenario holds, except of how many asked and those named: they are for its own size."""
    broken = [check for check in outcome.checks if not check.holds and check.metric not in ("asked", *but)]
    assert (list(outcome.failures), broken) == ([], [])


def test_hosts_with_wrong_clocks_find_what_dead_neighbours_and_set_clocks_would_hide() -> None:
    outcome = small("dht-clocks", 22, records=6, finders=3, shared_keys=1, sharers=4, lookers_max=6, calm_s=70.0)
    assert_good(outcome, "shared.records")


def test_a_fifth_of_the_contacts_without_power_hold_up_nobody() -> None:
    assert_good(small("dht-dead-contacts", 27, records=6, finders=3))


def test_records_run_out_with_their_publishers_or_are_taken_back_at_once() -> None:
    assert_good(small("dht-expiry", 20, keys=1, lookers=3, ttl_s=30.0, settle_s=5.0), "withdraw_s.count")


def test_two_parts_of_a_network_grow_together_again() -> None:
    assert_good(small("dht-partition", 9, keys=1, lookers=3, for_s=80.0, healed_s=130.0), "within.share")


def test_liars_near_a_key_neither_store_nor_hide_anything() -> None:
    sizes: dict[str, Any] = {"ids_tried": 200, "flood_s": 12.0, "publishers": 2, "lookers": 3, "settle_s": 8.0}
    outcome = small("dht-flood", 17, **sizes, keys=2, hoard=20, outlived_ttl_s=20.0)
    enough = {"offered": 100, "over.refused": 100, "outlived.brought": 50}
    assert_good(outcome, "liars.nearest", "held.key.max", "held.publisher.max", *enough)
    assert outcome.numbers["held.key.max"] <= RECORDS_PER_KEY_MAX
    assert {name: outcome.numbers[name] for name in enough if outcome.numbers[name] < enough[name]} == {}


def test_holders_that_are_asked_for_more_than_their_uplinks_take_put_readers_off_and_all_of_them_read_all() -> None:
    sizes: dict[str, Any] = {"publishers": 20, "value_bytes": 8000, "settle_s": 3.0, "within_s": 0.3}
    outcome = small("dht-busy-key", 27, **sizes)
    assert_good(outcome, "records", "whole", "put_off")
    assert (outcome.numbers["records"], outcome.numbers["whole"]) == (20, 30)
    assert outcome.numbers["put_off"] >= 1


def test_the_host_that_did_not_join_is_named_and_its_story_told() -> None:
    prepared = prepare(SCENARIOS / "dht-join.toml")
    hosts = {
        "boot": replace(prepared.scenario.hosts["boot"], count=1),
        "home": replace(prepared.scenario.hosts["home"], count=4, start_s=(0.0, 1.0)),
    }
    lost = Fault(1.0, "power-off", names=("home-3",))
    scenario = replace(prepared.scenario, hosts=hosts, faults=(lost,), duration_s=15.0)
    outcome = run_seed(replace(prepared, scenario=scenario), 1, is_timed=False)
    assert {check.metric: check.culprits for check in outcome.checks} == {
        "joined": ("home-3",),
        "join_s.p99": ("home-3",),
        "contacts.min": ("home-3",),
        "connections.over": (),
    }
    assert outcome.numbers["joined"] == 4
    assert any("fault home-3 power-off" in line for line in outcome.stories["home-3"])


@pytest.mark.parametrize("seed", [3])
def test_the_same_seed_tells_the_same_story(seed: int) -> None:
    told = [small("dht-expiry", 9, seed, keys=1, lookers=2, ttl_s=10.0, settle_s=5.0).trace_hash for _ in range(2)]
    assert told[0] == told[1]
