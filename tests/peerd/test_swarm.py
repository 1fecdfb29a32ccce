"""The swarm as a node sees it: real hosts and DHT on loopback, records announced, found, followed and taken back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from blocks.model.identity import Manifest, make_manifest
from blocks.model.source import resolve
from netsim.loop import run
from overlay.dht.node import Dht, DhtStatistics
from overlay.dht.records import Record
from overlay.errors import DialError
from overlay.host import Host
from peerd.announcer import SPAN_TTL_S, Announcer
from peerd.manifest_record import encode_manifest
from peerd.model_exchange import ModelFetcher, ModelShelf, NobodyHasIt
from peerd.swarm import FRESH_S, LOOK_S, AmbiguousModel, Swarm, UnknownModel
from routing.errors import BlocksPending, BlocksUnserved
from routing.placement import choose_span
from routing.records import MANIFESTS_KEY, SpanRecord, State, span_keys
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


# --- when it looks, in virtual time ---

READ_S = 0.5


class Holders:
    """What the DHT has under each key, as of each moment; notes who reads what when."""

    def __init__(self) -> None:
        self.under: dict[bytes, list[Record]] = {}
        self.reads: list[tuple[bytes, float, bool]] = []
        self.read_s = READ_S
        self.contacts = 0

    def statistics(self) -> DhtStatistics:
        return DhtStatistics(self.contacts, 0, 0, 0, 0, 0, 0)

    def follow(self, key: bytes) -> Followed:
        return Followed(self, key)

    def put(self, key: bytes, publisher: int, value: bytes) -> None:
        self.under.setdefault(key, []).append(Record(key, identity(publisher).peer_id, b"", 1, 3600, value, b""))

    def looks(self, key: bytes, *, thorough: bool | None = None) -> list[float]:
        """When a key was read, from the start of the run."""
        found = [at for read, at, was_thorough in self.reads if read == key and thorough in (None, was_thorough)]
        return [round(at - self.reads[0][1], 3) for at in found]


@dataclass
class Followed:
    holders: Holders
    key: bytes

    async def read(self, *, thorough: bool = False) -> tuple[Record, ...]:
        self.holders.reads.append((self.key, asyncio.get_running_loop().time(), thorough))
        told = tuple(self.holders.under.get(self.key, ()))
        await asyncio.sleep(self.holders.read_s)
        return told


def span_of(manifest: Manifest, server: int, span: Span) -> bytes:
    peer = identity(server).peer_id.multihash
    return SpanRecord(peer, (), manifest.model, span, State.ONLINE, FLOAT32, step_s=0.001).encode()


def watching(manifest: Manifest, servers: int, span: Span, scene: Callable[[Swarm, Holders], Awaitable[None]]) -> None:
    """A daemon's swarm in the background, in a network with so many servers of ``span``, the first of which publishes the manifest."""

    async def main() -> None:
        ports, holders = system_ports(), Holders()
        holders.put(MANIFESTS_KEY, 100, encode_manifest(manifest))
        for server in range(100, 100 + servers):
            holders.put(key_of(manifest), server, span_of(manifest, server, span))
        swarm = Swarm(Host(identity(1), ports), cast(Dht, holders), ports.clock, ports.randomness)
        async with asyncio.timeout(1e5), asyncio.TaskGroup() as group:
            background = group.create_task(swarm.run())
            await scene(swarm, holders)
            background.cancel()

    run(main())


def key_of(manifest: Manifest) -> bytes:
    (key,) = span_keys(manifest.model, Span(0, 4))
    return key


@pytest.mark.parametrize(("servers", "every_s"), [(1, 10.0), (100, 10.0), (150, 15.0), (400, 20.0)])
def test_an_idle_daemon_that_knows_many_servers_looks_less_often(
    manifest: Manifest, servers: int, every_s: float
) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(120)
        assert len(swarm.view(manifest.model).servers) == servers
        looks = holders.looks(key_of(manifest))
        assert len(looks) > 4
        for before, after in itertools.pairwise(looks):
            assert every_s <= after - before <= every_s + 2 * READ_S
        assert holders.looks(key_of(manifest), thorough=True) == []

    watching(manifest, servers, Span(0, 4), scene)


@pytest.mark.parametrize(("servers", "every_s"), [(1, 10.0), (300, 30.0), (900, 45.0)])
def test_an_idle_daemon_that_serves_itself_looks_still_less_often(
    manifest: Manifest, servers: int, every_s: float
) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(2 * READ_S + 0.1)
        serve_own(swarm, manifest)
        await asyncio.sleep(4 * every_s)
        looks = holders.looks(key_of(manifest))[1:]  # a pause was under way
        assert len(looks) >= 3
        for before, after in itertools.pairwise(looks):
            assert every_s <= after - before <= every_s + 3 * READ_S

    watching(manifest, servers, Span(0, 4), scene)


def test_what_a_daemon_that_serves_knows_does_not_run_out_between_its_looks(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        key = key_of(manifest)
        serve_own(swarm, manifest)
        first = holders.under[key]
        least = 1000
        for second in range(200):
            if second % round(SPAN_TTL_S / 2) == 0:
                holders.under[key] = [replace(found, sequence=2 + second, ttl_s=round(SPAN_TTL_S)) for found in first]
            await asyncio.sleep(1)
            least = min(least, len(swarm.view(manifest.model).servers)) if second > 2 else least
        assert least == len(first) + 1
        assert len(holders.looks(key)) < 7

    watching(manifest, 450, Span(0, 4), scene)


def test_who_drives_after_a_long_pause_looks_first(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await serve_idly(swarm, holders, manifest, 15)
        reads = len(holders.reads)
        await swarm.freshen(manifest.model)
        assert len(holders.reads) == reads, "what is known is as fresh as an idle daemon's is"
        await asyncio.sleep(15)
        await swarm.freshen(manifest.model)
        assert [(key, thorough) for key, _, thorough in holders.reads[reads:]] == [(key_of(manifest), False)]
        reads = len(holders.reads)
        await swarm.freshen(manifest.model)
        assert len(holders.reads) == reads

    watching(manifest, 900, Span(0, 4), scene)


def serve_own(swarm: Swarm, manifest: Manifest) -> None:
    peer = identity(1).peer_id.multihash
    swarm.put_own(SpanRecord(peer, (), manifest.model, Span(0, 2), State.ONLINE, FLOAT32, step_s=0.001), 4)


async def serve_idly(swarm: Swarm, holders: Holders, manifest: Manifest, seconds: float) -> None:
    """Until so long after a look."""
    serve_own(swarm, manifest)
    while len(holders.looks(key_of(manifest))) < 2:
        await asyncio.sleep(READ_S)
    await asyncio.sleep(seconds)


def test_of_many_who_drive_at_once_after_a_long_pause_the_first_looks_for_all(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await serve_idly(swarm, holders, manifest, 30)
        reads, began = len(holders.reads), asyncio.get_running_loop().time()
        await asyncio.gather(*(swarm.freshen(manifest.model) for _ in range(10)))
        assert [key for key, _, _ in holders.reads[reads:]] == [key_of(manifest)]
        assert asyncio.get_running_loop().time() - began < 2 * READ_S

    watching(manifest, 900, Span(0, 4), scene)


def test_who_drives_does_not_wait_for_holders_that_say_nothing(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await serve_idly(swarm, holders, manifest, 30)
        holders.read_s, began = 1000.0, asyncio.get_running_loop().time()
        await swarm.freshen(manifest.model)
        assert asyncio.get_running_loop().time() - began == pytest.approx(LOOK_S)
        assert len(swarm.plan(manifest.model, FLOAT32, ()).hops) == 1

    watching(manifest, 900, Span(0, 4), scene)


def test_a_daemon_that_drives_looks_often_for_a_while_however_many_servers_there_are(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(100)
        holders.reads.clear()
        swarm.stay_fresh()
        await asyncio.sleep(60)
        looks = holders.looks(key_of(manifest))
        gaps = [after - before for before, after in itertools.pairwise(looks)]
        assert all(2.5 <= gap <= 3.0 for gap in gaps[:4]), "manifests are looked at in one of them"
        assert gaps[-1] >= 20.0

    watching(manifest, 400, Span(0, 4), scene)


def test_an_idle_daemon_reads_manifests_every_minute_and_one_that_drives_oftener(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(200)
        gaps = [after - before for before, after in itertools.pairwise(holders.looks(MANIFESTS_KEY))]
        assert len(gaps) >= 2
        assert all(60.0 <= gap <= 71.0 for gap in gaps)
        holders.reads.clear()
        for _ in range(4):
            swarm.stay_fresh()
            await asyncio.sleep(10)
        looks = holders.looks(MANIFESTS_KEY)
        assert len(looks) >= 4
        assert all(8.0 <= after - before <= 11.0 for before, after in itertools.pairwise(looks))

    watching(manifest, 2, Span(0, 4), scene)


@pytest.mark.parametrize("demand", ["look_now", "refresh"])
def test_an_idle_daemon_reads_manifests_at_once_on_demand(manifest: Manifest, demand: str) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(25)
        began = asyncio.get_running_loop().time()
        holders.reads.clear()
        if demand == "refresh":
            await swarm.refresh()
        else:
            swarm.look_now()
            await asyncio.sleep(READ_S)
        key, at, thorough = holders.reads[0]
        assert (key, at, thorough) == (MANIFESTS_KEY, began, demand == "refresh")

    watching(manifest, 2, Span(0, 4), scene)


@pytest.mark.parametrize(("contacts", "is_thorough"), [(0, True), (19, True), (20, False)])
def test_a_newcomer_looks_thoroughly_where_few_nodes_are_known(
    manifest: Manifest, contacts: int, is_thorough: bool
) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(5)
        holders.contacts = contacts
        holders.reads.clear()
        await swarm.first_look()
        assert (key_of(manifest), is_thorough) in [(key, thorough) for key, _, thorough in holders.reads]

    watching(manifest, 2, Span(0, 4), scene)


def test_where_no_model_is_known_manifests_are_read_all_the_time(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        holders.under.clear()
        await asyncio.sleep(20)
        assert len(holders.looks(MANIFESTS_KEY)) >= 7

    watching(manifest, 0, Span(0, 4), scene)


@pytest.mark.parametrize("demand", ["look_now", "refresh"])
def test_a_demand_that_comes_while_manifests_are_being_read_has_them_read_again(
    manifest: Manifest, demand: str
) -> None:
    """What was read already is older than the demand."""

    async def scene(swarm: Swarm, holders: Holders) -> None:
        while len(holders.looks(MANIFESTS_KEY)) < 2:
            await asyncio.sleep(READ_S / 2)
        looks = len(holders.looks(MANIFESTS_KEY))
        if demand == "refresh":
            await swarm.refresh()
        else:
            swarm.look_now()
            await asyncio.sleep(5 * READ_S)
        assert len(holders.looks(MANIFESTS_KEY)) == looks + 1

    watching(manifest, 2, Span(0, 4), scene)


def test_blocks_are_said_to_be_unserved_only_by_a_thorough_look_that_is_fresh(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        while len(holders.looks(key_of(manifest))) < 3:
            await asyncio.sleep(READ_S / 2)
        await asyncio.sleep(READ_S)
        with pytest.raises(BlocksPending, match="2:4"):  # an idle look has just ended
            swarm.plan(manifest.model, FLOAT32, ())
        holders.reads.clear()
        await asyncio.sleep(2 * READ_S + 0.1)
        assert holders.looks(key_of(manifest), thorough=True), "the failed plan asked for a thorough look"
        with pytest.raises(BlocksUnserved, match="2:4"):
            swarm.plan(manifest.model, FLOAT32, ())
        await asyncio.sleep(FRESH_S - READ_S)

    watching(manifest, 2, Span(0, 2), scene)


def test_looks_at_whole_routes_are_light(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(5)
        for _ in range(5):
            swarm.plan(manifest.model, FLOAT32, ())
            await asyncio.sleep(2)
        assert len(holders.looks(key_of(manifest))) >= 4
        assert holders.looks(key_of(manifest), thorough=True) == []

    watching(manifest, 2, Span(0, 4), scene)


def test_who_finds_blocks_missing_looks_thoroughly_first_and_who_finds_none_does_not_look(manifest: Manifest) -> None:
    async def scene(swarm: Swarm, holders: Holders) -> None:
        await asyncio.sleep(5)
        holders.put(key_of(manifest), 150, span_of(manifest, 150, Span(2, 4)))
        await swarm.freshen(manifest.model)
        assert len(swarm.plan(manifest.model, FLOAT32, ()).hops) == 2
        reads = len(holders.reads)
        await swarm.freshen(manifest.model)
        assert len(holders.reads) == reads
        assert holders.looks(key_of(manifest), thorough=True)

    watching(manifest, 1, Span(0, 2), scene)
