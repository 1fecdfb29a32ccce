"""Forward and backward over whole daemons in the simulator: gradients are always the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blocks.protocol.call_table import CallTable
from netsim.call_mischief import CELLS
from netsim.outcome import Outcome
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


def test_copies_of_calls_are_answered_as_their_table_says_and_change_no_gradient() -> None:
    outcome = ran_with_copies()
    assert outcome.failures == (), outcome.replay
    assert outcome.numbers["batches.done"] == 16
    assert [outcome.numbers[name] for name in ("batches.wrong", "batches.failed", "unasked")] == [0, 0, 0]
    assert outcome.numbers["cells"] == len(CELLS)


def test_a_server_that_answers_another_call_of_the_same_id_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No driver asks so, and all gradients are right: only the copy's own answer tells."""
    receive = CallTable.receive
    known: dict[bytes, bytes] = {}

    def forgetful(self: CallTable, peer: bytes, call: bytes, digest: bytes, channel: object, now: float) -> Any:
        return receive(self, peer, call, known.setdefault(call, digest), channel, now)

    monkeypatch.setattr(CallTable, "receive", forgetful)
    outcome = ran_with_copies(batches=6)
    assert outcome.numbers["batches.wrong"] == 0
    assert outcome.numbers["unasked"] >= 1
    assert not outcome.passed


def ran_with_copies(batches: int = 16) -> Outcome:
    prepared = prepare(SCENARIOS / "call-copies.toml")
    scenario = prepared.scenario
    hosts = {group: replace(told, count=HOSTS[group]) for group, told in scenario.hosts.items()}
    settings = replace(prepared.settings, batches=batches)
    return run_seed(replace(prepared, scenario=replace(scenario, hosts=hosts), settings=settings), 1)
