"""Forward and backward over whole daemons in the simulator: gradients are always the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from netsim.runner import prepare, run_seed

HOSTS = {"boot": 1, "server": 4, "driver": 1}
SCENARIOS = Path(__file__).parents[2] / "scenarios"


def test_batches_whose_servers_are_struck_come_back_with_the_models_gradients() -> None:
    prepared = prepare(SCENARIOS / "call-loss.toml")
    scenario = prepared.scenario
    hosts = {group: replace(told, count=HOSTS[group]) for group, told in scenario.hosts.items()}
    settings = replace(prepared.settings, batches=2, strike_at_s=(0.0, 0.3))
    shorter = replace(prepared, scenario=replace(scenario, hosts=hosts), settings=settings)
    outcome = run_seed(shorter, 1)
    assert outcome.failures == (), outcome.replay
    assert outcome.numbers["batches.done"] == 2
    assert outcome.numbers["batches.wrong"] == 0
    assert outcome.numbers["servers_lost"] >= 1
