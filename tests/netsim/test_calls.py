"""Forward and backward over whole daemons in the simulator: gradients are always the model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from blocks.protocol.call_table import CallTable
from blocks.protocol.calls import CallRequest
from netsim.call_mischief import CELLS
from netsim.outcome import Outcome
from netsim.peers.node import NodePeer
from netsim.runner import Prepared, prepare, run_seed
from netsim.sim_host import Machine
from netsim.strikes import Strike, Striker
from overlay.host import Host
from overlay.rpc.types import Message
from peerd.calls.remote import call_remote

HOSTS = {"boot": 1, "server": 4, "driver": 1}
SCENARIOS = Path(__file__).parents[2] / "scenarios"


def test_batches_whose_servers_are_struck_come_back_with_the_models_gradients() -> None:
    shorter = of_few_hosts("call-loss", batches=2, strike_at_s=(0.0, 0.3))
    outcome = run_seed(shorter, 1)
    assert outcome.failures == (), outcome.replay
    assert outcome.numbers["batches.done"] == 2
    assert outcome.numbers["batches.wrong"] == 0
    assert outcome.numbers["servers_lost"] >= 1


def test_only_a_server_that_has_a_call_is_struck_and_every_kind_before_any_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is under way is heard from the driver's caller and the server's books, and not from streams."""
    asked: Counter[bytes] = Counter()
    struck: list[tuple[str, bool]] = []
    strike_one = Striker.strike_one

    async def counted(
        host: Host, peer: bytes, addresses: Sequence[str], request: CallRequest, expect: Callable[[float], None]
    ) -> Message:
        asked[peer] += 1
        try:
            return await call_remote(host, peer, addresses, request, expect)
        finally:
            asked[peer] -= 1

    def seen(self: Striker, target: Machine, onward: Machine, strike: Strike) -> bool:
        node = cast(NodePeer, target.peer).node
        has_call = asked[node.identity.peer_id.multihash] > 0 and node.calls._service.bytes_reserved > 0
        if not strike_one(self, target, onward, strike):
            return False
        struck.append((strike.kind, has_call))
        return True

    monkeypatch.setattr("peerd.calls.caller.call_remote", counted)
    monkeypatch.setattr(Striker, "strike_one", seen)
    kinds = ("kill", "power-off", "restart", "reset")
    quick = of_few_hosts("call-loss", batches=8, strikes=kinds, strike_at_s=(0.0, 0.3), back_after_s=(0.5, 1.5))
    outcome = run_seed(quick, 1)
    assert outcome.numbers["batches.wrong"] == outcome.numbers["batches.failed"] == 0
    assert len(struck) == outcome.numbers["strikes"] >= len(kinds)
    assert [kind for kind, has_call in struck if not has_call] == []
    assert sorted(kind for kind, _ in struck[: len(kinds)]) == sorted(kinds)
    assert outcome.numbers["strikes.kinds"] == len(kinds)
    assert outcome.numbers["servers_lost"] >= len(struck), "each of these ends a call"


def test_an_answer_that_is_long_on_its_way_is_no_silence() -> None:
    """A 1 MiB answer over 1 Mbit/s takes 8 s, in which its server can say nothing else: no call is lost by that."""
    told = of_few_hosts("call-loss", batches=1, strikes=(), rows=(4, 4), tokens=(64, 64), prompts=0.0)
    wide = {name: replace(settings, width=1024) for name, settings in told.group_settings.items()}
    links = replace(told.scenario.links, uplink_mbit=(1.0,), loss=0.0)
    outcome = run_seed(replace(told, scenario=replace(told.scenario, links=links), group_settings=wide), 1)
    assert outcome.failures == (), outcome.replay
    assert outcome.numbers["batches.done"] == 1
    assert outcome.numbers["batches.wrong"] == outcome.numbers["servers_lost"] == 0


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
    return run_seed(of_few_hosts("call-copies", batches=batches), 1)


def of_few_hosts(name: str, **settings: Any) -> Prepared:
    """A scenario with fewer hosts and other settings."""
    prepared = prepare(SCENARIOS / f"{name}.toml")
    hosts = {group: replace(told, count=HOSTS[group]) for group, told in prepared.scenario.hosts.items()}
    scenario = replace(prepared.scenario, hosts=hosts)
    return replace(prepared, scenario=scenario, settings=replace(prepared.settings, **settings))
