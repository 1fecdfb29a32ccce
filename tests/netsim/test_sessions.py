"""Whole daemons in the simulator: the text is always the model's. Short runs of the scenarios; seeds that found something stay."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from netsim.outcome import Outcome
from netsim.runner import prepare, run_seed
from netsim.scenario import Bound
from netsim.strikes import Kinds

SCENARIOS = Path(__file__).parents[2] / "scenarios"
HOSTS = {"boot": 1, "server": 4, "driver": 1}
MUST_HOLD = ("texts.wrong", "texts.failed", "unasked")


def ran(name: str, seed: int, checks: Mapping[str, Bound] | None = None, **settings: Any) -> Outcome:
    """The scenario with fewer hosts and other settings; what it must hold whatever these are, holds."""
    outcome = short(name, seed, checks, **settings)
    assert outcome.failures == (), outcome.replay
    assert [outcome.numbers[metric] for metric in MUST_HOLD] == [0.0, 0.0, 0.0], outcome.replay
    assert outcome.numbers["texts.done"] == outcome.numbers["texts.asked"] > 0
    return outcome


def short(name: str, seed: int, checks: Mapping[str, Bound] | None = None, **settings: Any) -> Outcome:
    """The same, and whatever came of it; with other bounds where ``checks`` says so."""
    prepared = prepare(SCENARIOS / f"{name}.toml")
    scenario = prepared.scenario
    hosts = {group: replace(told, count=HOSTS[group]) for group, told in scenario.hosts.items()}
    shorter = replace(
        prepared,
        scenario=replace(scenario, hosts=hosts, checks={**scenario.checks, **(checks or {})}),
        settings=replace(prepared.settings, leases_end_s=0.0, **settings),
    )
    return run_seed(shorter, seed)


def test_servers_that_start_at_one_moment_share_the_blocks_and_give_the_models_texts() -> None:
    """Seed 1 had all four load blocks 0:6: they placed themselves before they had met anybody."""
    outcome = ran("session-plain", 1, texts=1)
    assert outcome.numbers["replays"] == 0
    assert outcome.numbers["online_s"] < 10


def test_hops_that_are_struck_cost_pauses_and_no_token() -> None:
    outcome = ran("session-loss", 1, texts=2, back_after_s=(2.0, 3.0), think_s=(6.0, 6.0), forgets=0.0)
    assert outcome.numbers["strikes"] == 2
    assert outcome.numbers["replays"] >= 1


def test_kv_that_a_server_takes_back_is_filled_from_the_journal_before_it_and_costs_no_replay() -> None:
    """Without journals the text is the same, sent again as tokens: only these numbers tell."""
    outcome = ran("session-loss", 1, texts=2, strikes=(), think_s=(6.0, 6.0))
    assert outcome.numbers["strikes.forget"] == outcome.numbers["journal.repairs"] == 2
    assert outcome.numbers["replays"] == 0


def test_each_kind_of_strike_comes_once_before_any_comes_again_and_one_that_failed_comes_next() -> None:
    kinds = Kinds(("kill", "freeze", "reset"), random.Random(4))
    first = kinds.take()
    kinds.put_back(first)
    drawn = [kinds.take() for _ in range(6)]
    assert drawn[0] == first
    assert sorted(drawn[:3]) == sorted(drawn[3:]) == ["freeze", "kill", "reset"]


def test_lids_that_close_paths_that_get_slow_and_disks_that_are_full_cost_no_token() -> None:
    outcome = ran("session-worn", 1, texts=3, think_s=(6.0, 6.0), back_after_s=(2.0, 3.0), strike_drivers=0.0)
    assert outcome.numbers["strikes.kinds"] == 3


def test_drivers_that_die_take_their_texts_along_and_get_the_next_ones_right() -> None:
    outcome = ran("session-drivers", 1, texts=1, back_after_s=(3.0, 6.0), strikes=("restart",))
    assert outcome.numbers["texts.taken_along"] == 1


def test_the_demo_model_in_virtual_time_gives_the_text_of_local_transformers() -> None:
    outcome = ran("session-torch", 1, texts=1, new_tokens=(8, 10), strikes=("kill",), back_after_s=(3.0, 6.0))
    assert outcome.numbers["strikes"] == 1
