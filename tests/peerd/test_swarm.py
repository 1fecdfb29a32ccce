"""The swarm as a node sees it: real hosts and DHT on loopback, records announced, found, followed and taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blocks.model.identity import Manifest, make_manifest
from blocks.model.source import resolve
from overlay.dht.node import Dht
from overlay.errors import DialError
from overlay.host import Host
from peerd.announcer import Announcer
from peerd.model_exchange import ModelFetcher, ModelShelf, NobodyHasIt
from peerd.swarm import FRESH_S, AmbiguousModel, Swarm, UnknownModel
from routing.errors import BlocksPending, BlocksUnserved
from routing.placement import choose_span
from routing.records import SpanRecord, State
from routing.types import ComputeClass, Span
from tests.models import make_tiny
from tests.overlay.network import LOOPBACK, identity, system_ports

FLOAT32 = ComputeClass("none", "float32")


@dataclass
class Member:
    """One node's share of the swarm, without models loaded."""

    host: Host
    dht: Dht
    swarm: Swarm
    announcer: Announcer

    def record(self, manifest: Manifest, span: Span, state: State = State.ONLINE) -> SpanRecord:
        addresses = tuple(str(address.without_peer()) for address in self.host.addresses)
        return SpanRecord(self.host.peer_id.multihash, addresses, manifest.model, span, state, FLOAT32, step_s=0.001)


def run_members(count: int, scene: Callable[..., Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            members: list[Member] = []
            for number in range(1, count + 1):
                ports = system_ports()
                host = await stack.enter_async_context(Host(identity(number), ports))
                await host.listen(LOOPBACK)
                dht = await stack.enter_async_context(Dht(host, ports))
                swarm = Swarm(host, dht, ports.clock, ports.randomness)
                members.append(Member(host, dht, swarm, Announcer(host, dht, swarm, ports.clock)))
                if number > 1:
                    first = members[0].host
                    assert await dht.bootstrap([(first.peer_id, first.addresses)]) == 1
            await scene(*members)

    asyncio.run(main())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    directory = make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")
    return make_manifest(resolve(str(directory)), FLOAT32)


class SkewedClock:
    """The loop's time, ahead by as much as a test says."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead_s


async def seen_by(member: Member, manifest: Manifest, spans: list[tuple[str, str]]) -> None:
    """Until the member sees exactly these (span, state)."""
    async with asyncio.timeout(10):
        while True:
            await member.swarm.refresh()
            found = [(str(server.span), server.state.value) for server in member.swarm.view(manifest.model).servers]
            if sorted(found) == sorted(spans):
                return
            await asyncio.sleep(0.02)


def test_what_one_announces_the_others_see_change_and_go(manifest: Manifest) -> None:
    async def scene(one: Member, two: Member, three: Member) -> None:
        one.announcer.announce_manifest(manifest)
        one.announcer.announce(one.record(manifest, Span(0, 2), State.JOINING), 4)
        two.announcer.announce(two.record(manifest, Span(2, 4)), 4)
        await seen_by(three, manifest, [("0:2", "joining"), ("2:4", "online")])
        with pytest.raises(BlocksPending, match="0:2"):
            three.swarm.plan(manifest.model, FLOAT32, ())
        one.announcer.announce(one.record(manifest, Span(0, 2)), 4)
        await seen_by(three, manifest, [("0:2", "online"), ("2:4", "online")])
        route = three.swarm.plan(manifest.model, FLOAT32, ())
        assert [hop.peer for hop in route.hops] == [one.host.peer_id.multihash, two.host.peer_id.multihash]
        await two.announcer.withdraw()
        await seen_by(three, manifest, [("0:2", "online")])
        with pytest.raises(BlocksUnserved, match="2:4"):
            three.swarm.plan(manifest.model, FLOAT32, ())

    run_members(3, scene)


def test_claims_are_seen_before_anybody_told_what_the_model_is(manifest: Manifest) -> None:
    async def scene(one: Member, newcomer: Member) -> None:
        one.announcer.announce(one.record(manifest, Span(0, 2), State.JOINING), 4)
        newcomer.swarm.expect_blocks(manifest.model, 4)
        await seen_by(newcomer, manifest, [("0:2", "joining")])
        assert choose_span(newcomer.swarm.view(manifest.model), 2, FLOAT32) == Span(2, 4)

    run_members(2, scene)


def test_nobody_serves_is_said_only_after_a_fresh_look(manifest: Manifest) -> None:
    async def scene(one: Member, reader: Member) -> None:
        one.announcer.announce_manifest(manifest)
        one.announcer.announce(one.record(manifest, Span(0, 2)), 4)
        clock = SkewedClock()
        ports = system_ports()
        reader.swarm = Swarm(reader.host, reader.dht, clock, ports.randomness)
        await seen_by(reader, manifest, [("0:2", "online")])
        with pytest.raises(BlocksUnserved, match="2:4"):
            reader.swarm.plan(manifest.model, FLOAT32, ())
        clock.ahead_s = FRESH_S + 1.0
        with pytest.raises(BlocksPending, match="2:4"):
            reader.swarm.plan(manifest.model, FLOAT32, ())
        one.announcer.announce(one.record(manifest, Span(0, 4)), 4)
        await reader.swarm.freshen(manifest.model)
        assert reader.swarm.plan(manifest.model, FLOAT32, ()).hops[0].span == Span(0, 4)

    run_members(2, scene)


def test_what_this_node_resolved_itself_beats_what_strangers_call_theirs(manifest: Manifest, tmp_path: Path) -> None:
    twin = make_manifest(resolve(str(make_tiny("llama", tmp_path / "tiny", seed=1))), FLOAT32)

    async def scene(one: Member, mallory: Member, reader: Member) -> None:
        reader.swarm.learn_name("tiny", manifest.model)
        one.announcer.announce_manifest(manifest)
        mallory.announcer.announce_manifest(twin)
        async with asyncio.timeout(5):
            while len(reader.swarm.models()) < 2:
                await reader.swarm.refresh()
        assert reader.swarm.resolve_name("tiny").manifest.model == manifest.model
        assert reader.swarm.name_of(manifest.model) == "tiny"
        assert reader.swarm.name_of(twin.model) == f"tiny@{twin.model.hex()[:12]}"
        with pytest.raises(UnknownModel):
            reader.swarm.resolve_name(f"tiny@{twin.model.hex()[:3]}")

    run_members(3, scene)


def test_of_two_manifests_of_one_model_the_one_that_more_servers_give_counts(manifest: Manifest) -> None:
    false = replace(manifest, tensors=tuple(replace(entry, sha256=bytes(32)) for entry in manifest.tensors))

    async def scene(mallory: Member, one: Member, two: Member, reader: Member) -> None:
        for member, said in ((mallory, false), (one, manifest), (two, manifest)):
            member.announcer.announce_manifest(said)
        async with asyncio.timeout(5):
            while not reader.swarm.models() or len(reader.swarm.models()[0].publishers) < 3:
                await reader.swarm.refresh()
        assert reader.swarm.models()[0].manifest.tensors == manifest.tensors

    run_members(4, scene)


def test_a_peer_that_did_well_again_is_forgiven(manifest: Manifest) -> None:
    async def scene(one: Member, reader: Member) -> None:
        one.announcer.announce_manifest(manifest)
        peer = one.host.peer_id.multihash
        lengths = []
        for _ in range(2):
            for _ in range(3):
                reader.swarm.blame(peer, DialError("gone"))
            lengths.append(reader.swarm.health.seconds_left(peer, asyncio.get_running_loop().time()))
            reader.swarm.praise([peer])
            assert reader.swarm.health.seconds_left(peer, asyncio.get_running_loop().time()) == 0.0
        assert lengths == pytest.approx([4.0, 4.0], abs=0.5), "the second time starts anew"

    run_members(2, scene)


def test_a_record_in_somebody_elses_name_is_not_believed(manifest: Manifest) -> None:
    async def scene(one: Member, mallory: Member, reader: Member) -> None:
        one.announcer.announce_manifest(manifest)
        one.announcer.announce(one.record(manifest, Span(0, 4)), 4)
        forged = replace(one.record(manifest, Span(0, 4)), state=State.DRAINING)
        mallory.announcer.announce(forged, 4)
        await seen_by(reader, manifest, [("0:4", "online")])
        await asyncio.sleep(0.2)
        await seen_by(reader, manifest, [("0:4", "online")])

    run_members(3, scene)


def test_a_peer_that_failed_is_used_last(manifest: Manifest) -> None:
    async def scene(one: Member, two: Member, reader: Member) -> None:
        one.announcer.announce_manifest(manifest)
        for member in (one, two):
            member.announcer.announce(member.record(manifest, Span(0, 4)), 4)
        await seen_by(reader, manifest, [("0:4", "online"), ("0:4", "online")])
        first = reader.swarm.plan(manifest.model, FLOAT32, ()).hops[0].peer
        reader.swarm.blame(first, DialError("gone"))
        assert reader.swarm.plan(manifest.model, FLOAT32, ()).hops[0].peer != first

    run_members(3, scene)


def test_models_are_found_by_name_and_twins_by_digits(manifest: Manifest, tmp_path: Path) -> None:
    twin_directory = make_tiny("llama", tmp_path / "tiny", seed=1)
    twin = make_manifest(resolve(str(twin_directory)), FLOAT32)
    assert twin.name == manifest.name
    assert twin.model != manifest.model

    async def scene(one: Member, reader: Member) -> None:
        with pytest.raises(UnknownModel):
            reader.swarm.resolve_name(None)
        one.announcer.announce_manifest(manifest)
        await seen_by(reader, manifest, [])
        assert reader.swarm.resolve_name(None).manifest.model == manifest.model
        assert reader.swarm.resolve_name("tiny").manifest.model == manifest.model
        with pytest.raises(UnknownModel, match="tiny"):
            reader.swarm.resolve_name("huge")
        one.announcer.announce_manifest(twin)
        async with asyncio.timeout(5):
            while len(reader.swarm.models()) < 2:
                await reader.swarm.refresh()
        for name in (None, "tiny"):
            with pytest.raises(AmbiguousModel, match=manifest.model.hex()[:12]):
                reader.swarm.resolve_name(name)
        assert reader.swarm.resolve_name(reader.swarm.name_of(twin.model)).manifest.model == twin.model

    run_members(2, scene)


def test_who_waits_is_woken_by_a_change(manifest: Manifest) -> None:
    async def scene(one: Member, reader: Member) -> None:
        async with asyncio.TaskGroup() as group:
            background = group.create_task(reader.swarm.run())
            waiting = group.create_task(reader.swarm.wait_changed(20))
            await asyncio.sleep(0)
            one.announcer.announce_manifest(manifest)
            await waiting
            background.cancel()

    run_members(2, scene)


def test_who_drives_looks_at_once_for_a_server_that_hung_up_and_nobody_else_does(manifest: Manifest) -> None:
    """Of 40 daemons, 38 looked at once for each server that left, with 50 calls each."""

    async def scene(one: Member, reader: Member) -> None:
        one.announcer.announce_manifest(manifest)
        one.announcer.announce(one.record(manifest, Span(0, 4)), 4)
        await seen_by(reader, manifest, [("0:4", "online")])
        server = one.host.peer_id.multihash
        reader.swarm.hung_up(server)
        assert not reader.swarm._wake.is_set()
        reader.swarm.plan(manifest.model, FLOAT32, ())
        reader.swarm._wake.clear()
        reader.swarm.hung_up(server)
        assert reader.swarm._wake.is_set()

    run_members(2, scene)


def test_a_driver_fetches_what_it_lacks_and_believes_only_the_manifest(manifest: Manifest, tmp_path: Path) -> None:
    directory = make_tiny("llama", tmp_path / "tiny")
    source = resolve(str(directory))

    async def scene(server: Member, reader: Member) -> None:
        ModelShelf(server.host).add(source, manifest)
        servers = [(server.host.peer_id.multihash, tuple(map(str, server.host.addresses)))]
        fetcher = ModelFetcher(reader.host, tmp_path / "cache")
        files = await fetcher.text_files(manifest, servers)
        assert files["tokenizer.json"] == (directory / "tokenizer.json").read_bytes()
        tensors = await fetcher.tensors(manifest, servers)
        assert set(tensors) == {entry.name for entry in manifest.tensors}
        for path in (tmp_path / "cache").rglob("file-*"):
            path.write_bytes(b"{}")  # a damaged cache is fetched again
        assert (await fetcher.text_files(manifest, servers))["tokenizer.json"] == files["tokenizer.json"]
        (directory / "tokenizer.json").write_bytes(b"x" * len(files["tokenizer.json"]))
        with pytest.raises(NobodyHasIt, match=r"tokenizer\.json"):
            await ModelFetcher(reader.host, tmp_path / "fresh").text_files(manifest, servers)

    run_members(2, scene)
