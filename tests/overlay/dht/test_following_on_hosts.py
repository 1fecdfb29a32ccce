"""Keys that are followed on real hosts: what travels, what is seen of changes, and peers that know nothing of cursors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from overlay.dht import limits
from overlay.dht.following import FollowedKey
from overlay.dht.node import Dht, DhtConfig
from overlay.dht.pages import Page
from overlay.dht.records import Record, decode_records, encode_records, location_of, seal_record
from overlay.dht.store import Put, RecordStore
from overlay.dht.table import Contact
from overlay.host import Host
from overlay.identity import PeerId
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call, serve_unary
from tests.overlay.dht.test_node import KEY, run_nodes
from tests.overlay.network import LOOPBACK, identity, system_ports, until

LIFE_S = 60.0
LASTING_S = limits.SHORT_LIVED_S + 1.0


class Wire:
    """What holders tell, by request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._told: list[int] = []
        page_of = Dht.page_of

        def noted(node: Dht, key: bytes, since: bytes | None, known: Sequence[bytes] = ()) -> Page:
            page = page_of(node, key, since, known)
            self._told.append(len(page.records))
            return page

        monkeypatch.setattr(Dht, "page_of", noted)

    def told(self) -> list[int]:
        """How many records each answer held, since the last time."""
        told, self._told = self._told, []
        return told


class Ahead:
    """The loop's time, ahead by as much as a test says."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.by_s


async def read(followed: FollowedKey, *, thorough: bool = False) -> list[bytes]:
    return sorted(record.value for record in await followed.read(thorough=thorough))


def members(node: Dht, host: Host) -> tuple[Contact, ...]:
    """The neighbourhood of the key as that node remembers it."""
    return node._neighbourhoods.members(location_of(KEY), 1, host.ports.clock.now())


def held_record(number: int) -> Record:
    """Of so many publishers that each takes few places of a key."""
    return seal_record(identity(1000 + number % 50), KEY, number.to_bytes(4, "big"), 1, 60, number.to_bytes(4, "big"))


def test_a_second_read_brings_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        followed = nodes[-1].follow(KEY)
        for number in range(5):
            await nodes[1].publish_and_wait(KEY, bytes([number]), bytes([number]), LIFE_S)
        wire.told()
        assert len(await read(followed)) == 5
        assert wire.told() == [5, 0, 0, 0], "the first tells all, and the others what it didn't tell"
        assert len(await read(followed)) == 5
        assert wire.told() == [0] * limits.READ_HOLDERS
        await nodes[1].publish_and_wait(KEY, b"new", b"new", LIFE_S)
        await nodes[2].publish_and_wait(KEY, bytes([0]), b"another's", LIFE_S)
        assert len(await read(followed)) == 7
        assert wire.told() == [2] * limits.READ_HOLDERS

    run_nodes(7, scene, clients=1)


def test_a_change_and_a_withdrawal_reach_who_follows() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        readers = [nodes[3].follow(KEY), nodes[-1].follow(KEY)]
        for value in (b"first", b"second"):
            await nodes[1].publish_and_wait(KEY, b"a", value, LIFE_S)
            assert [await read(followed) for followed in readers] == [[value]] * 2
        await nodes[1].withdraw(KEY, b"a")
        assert [await read(followed) for followed in readers] == [[]] * 2
        await nodes[1].publish_and_wait(KEY, b"a", b"again", LIFE_S)
        assert [await read(followed) for followed in readers] == [[b"again"]] * 2

    run_nodes(5, scene, clients=1)


def test_a_holder_that_begins_anew_hides_nothing_new_and_loses_the_reader_nothing() -> None:
    """Its numbers begin anew too: what it takes then has lower ones than what it told before."""

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        holder, publisher, reader = nodes
        followed = reader.follow(KEY)
        for number in range(3):
            await publisher.publish_and_wait(KEY, bytes([number]), bytes([number]), LIFE_S)
        assert len(await read(followed)) == 3
        holder._store, holder._life = RecordStore(), b"another."
        assert len(await read(followed)) == 3
        holder._store, holder._life = RecordStore(), b"a third."
        await publisher.publish_and_wait(KEY, b"late", b"late", LIFE_S)
        assert holder.statistics().stored == 1
        assert b"late" in await read(followed)

    run_nodes(3, scene, clients=2)


def test_a_record_that_is_not_renewed_goes_at_its_time_and_one_that_is_stays() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        ahead = Ahead()
        followed = FollowedKey(KEY, nodes[-1], b"salt", ahead)
        for subkey in (b"left", b"kept"):
            await nodes[1].publish_and_wait(KEY, subkey, subkey, LIFE_S)
        assert await read(followed) == [b"kept", b"left"]
        ahead.by_s = LIFE_S / 2
        await nodes[1].publish_and_wait(KEY, b"kept", b"kept", LIFE_S)
        assert await read(followed) == [b"kept", b"left"]
        ahead.by_s = LIFE_S + 5
        assert await read(followed) == [b"kept"]

    run_nodes(3, scene, clients=1)


def test_more_records_than_a_page_holds_all_arrive_and_travel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        holder, reader = nodes
        for number in range(300):
            holder.publish(KEY, number.to_bytes(4, "big"), b"p" + number.to_bytes(4, "big"), LIFE_S)
            assert holder._store.put(held_record(number), hosts[0].ports.clock.now()) is Put.STORED
        followed = reader.follow(KEY)
        assert len(await read(followed)) == 600
        assert wire.told() == [256, 256, 88]
        assert len(await read(followed)) == 600
        assert wire.told() == [0]
        assert len(await reader.get(KEY)) == 600, "who looks a key up once reads all pages too"

    run_nodes(2, scene, clients=1)


def test_an_asker_that_knows_no_cursors_gets_the_newest() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        for number in range(limits.PAGE_RECORDS + 44):
            nodes[0]._store.put(held_record(number), hosts[0].ports.clock.now())
        question = Message("find_value", {"key": KEY, "target": location_of(KEY)})
        answer = await call(hosts[1], hosts[0].peer_id, "/peerd/dht/1", question)
        records = decode_records(bytes(answer.parts[0].data), limits.PAGE_RECORDS)
        numbers = [int.from_bytes(record.value, "big") for record in records if record is not None]
        assert sorted(numbers) == list(range(44, limits.PAGE_RECORDS + 44))

    run_nodes(2, scene, clients=1)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"cursor": None, "left": None, "more": True},
        {"cursor": "text", "left": [1], "more": 1},
        {"cursor": b"x" * (limits.CURSOR_BYTES_MAX + 1), "left": ["a", None], "more": True},
        {"cursor": b"", "left": [-5, 2.5], "more": True},
        {"cursor": b"same", "left": [2**63, True], "more": True},
    ],
    ids=["none", "null", "of other types", "too long", "odd lives", "for ever the same page"],
)
def test_an_answer_without_a_good_cursor_or_lives_is_read_and_asked_for_anew(extra: dict[str, object]) -> None:
    asked: list[object] = []

    async def answer(peer: PeerId, request: Message) -> Message:
        if request.kind == "find_value":
            asked.append(request.header.get("since"))
        packed = encode_records([held_record(1), held_record(2)])
        return Message("value", {"nodes": [], **extra}, (Part("records", "uint8", (len(packed),), packed),))

    async def main() -> None:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            old, host = (Host(identity(number), system_ports()) for number in (1, 2))
            for each in (old, host):
                await stack.enter_async_context(each)
                await each.listen(LOOPBACK)
            serve_unary(old, "/peerd/dht/1", dict.fromkeys(("ping", "find_node", "find_value", "store"), answer))
            reader = await stack.enter_async_context(Dht(host, host.ports, DhtConfig(server=False)))
            await reader.bootstrap([(old.peer_id, old.addresses)])
            ahead = Ahead()
            followed = FollowedKey(KEY, reader, b"salt", ahead)
            assert len(await read(followed)) == 2
            ahead.by_s = 55.0
            assert len(await read(followed)) == 2, "they live as long as their publisher said"
            assert len(asked) <= 4
            assert all(since in (b"", b"same") for since in asked)

    asyncio.run(main())


def test_a_holder_that_pages_for_ever_is_left_after_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def answer(peer: PeerId, request: Message) -> Message:
        if request.kind == "find_value":
            asked.append(request.header.get("since"))
        packed = encode_records([])
        header = {"nodes": [], "cursor": len(asked).to_bytes(4, "big"), "left": [], "more": True}
        return Message("value", header, (Part("records", "uint8", (len(packed),), packed),))

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        serve_unary(hosts[0], "/peerd/dht/1", {"find_value": answer})
        (contact,) = nodes[1]._table.contacts()
        found = await nodes[1].ask_for(contact, KEY, b"", [])
        assert found is not None and found.cursor == limits.PAGES_MAX.to_bytes(4, "big")
        assert len(asked) == limits.PAGES_MAX

    run_nodes(2, scene, clients=1)


@pytest.mark.parametrize(
    "known",
    [
        b"",
        b"short",
        bytes(limits.FINGERPRINT_BYTES),
        bytes((limits.RECORDS_PER_KEY_MAX + 1) * limits.FINGERPRINT_BYTES),
    ],
    ids=["none", "short", "of no record", "too many"],
)
def test_what_an_asker_says_that_it_knows_in_vain_hides_nothing(known: bytes) -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        nodes[0]._store.put(held_record(1), hosts[0].ports.clock.now())
        question = Message(
            "find_value",
            {"key": KEY, "target": location_of(KEY), "since": b""},
            (Part("known", "uint8", (len(known),), known),),
        )
        answer = await call(hosts[1], hosts[0].peer_id, "/peerd/dht/1", question)
        assert decode_records(bytes(answer.parts[0].data), 10) == [held_record(1)]
        assert answer.header["lacks"] == ([0] if len(known) == limits.FINGERPRINT_BYTES else [])

    run_nodes(2, scene, clients=1)


@pytest.mark.parametrize("lacks", [None, 7, {}, [-1], [1], [2**63], [True], ["0"], [[0]], [0] * 1000])
def test_what_a_holder_says_that_it_lacks_names_what_it_was_asked_with_or_nothing(lacks: object) -> None:
    async def answer(peer: PeerId, request: Message) -> Message:
        packed = encode_records([])
        header = {"nodes": [], "cursor": b"c", "left": [], "lacks": lacks}
        return Message("value", header, (Part("records", "uint8", (len(packed),), packed),))

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        serve_unary(hosts[0], "/peerd/dht/1", {"find_value": answer})
        (contact,) = nodes[1]._table.contacts()
        found = await nodes[1].ask_for(contact, KEY, b"", [bytes(limits.FINGERPRINT_BYTES)])
        assert found is not None
        assert set(found.lacks) <= {0}
        assert len(found.lacks) <= limits.LACKS_TOLD_MAX

    run_nodes(2, scene, clients=1)


def test_a_holder_that_lost_records_is_told_of_the_lasting_one_by_who_follows_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "CORRECTED_AFTER_S", 0.0)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[0].publish_and_wait(KEY, b"a", b"lasting", LASTING_S)
        await nodes[2].publish_and_wait(KEY, b"a", b"short-lived", LIFE_S)
        forgetful, followed = nodes[1], nodes[-1].follow(KEY)
        forgetful._store = RecordStore()
        followed._salt = next(
            salt
            for salt in (bytes([number]) for number in range(100))
            if _is_first(FollowedKey(KEY, nodes[-1], salt, Ahead()), hosts[0], hosts[1])
        )
        assert await read(followed) == [b"lasting", b"short-lived"]
        await until(lambda: forgetful.statistics().stored > 0)
        await asyncio.gather(*nodes[-1]._running.values())
        assert [record.value for record in forgetful.held(KEY)] == [b"lasting"]

    run_nodes(4, scene, clients=1)


def _is_first(followed: FollowedKey, one: Host, other: Host) -> bool:
    """Whether that reader asks the one before the other."""
    order = followed._order([Contact(one.peer_id), Contact(other.peer_id)])
    return order[0].peer == one.peer_id


def test_a_holder_that_is_gone_is_replaced_and_the_key_still_read() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", LIFE_S)
        followed = nodes[-1].follow(KEY)
        assert await read(followed) == [b"kept"]
        for gone in (2, 3, 4):
            nodes[gone]._protocol.stop()
        await nodes[1].publish_and_wait(KEY, b"a", b"new", LIFE_S)
        assert await read(followed) == [b"new"]
        assert followed.answers == 3, "of six, three are left"
        left = [host.peer_id for host in (hosts[0], hosts[1], hosts[5])]
        assert sorted(contact.peer for contact in members(nodes[-1], hosts[-1])) == sorted(left)

    run_nodes(7, scene, clients=1)


def test_a_newcomer_that_a_holder_names_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RELOCATE_S", 0.0)

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        reader = nodes[-1]
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", LIFE_S)
        followed = reader.follow(KEY)
        assert await read(followed) == [b"kept"]
        assert await read(followed) == [b"kept"]
        assert len(members(reader, hosts[-1])) == 2, "nothing changed, and nothing is looked for"
        async with Host(identity(99), system_ports()) as host:
            await host.listen(LOOPBACK)
            async with Dht(host, host.ports) as newcomer:
                await newcomer.bootstrap([(None, hosts[0].addresses)])
                await until(lambda: any(peer == host.peer_id for peer, _ in nodes[0].known_peers()))
                for _ in range(2):
                    assert await read(followed) == [b"kept"]
                assert host.peer_id in [contact.peer for contact in members(reader, hosts[-1])]

    run_nodes(3, scene, clients=1)


def test_who_follows_does_not_look_for_the_holders_each_time() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        reader = nodes[-1]
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", LIFE_S)
        followed = reader.follow(KEY)
        await read(followed)
        before = reader.statistics().calls
        for _ in range(5):
            await read(followed)
        assert reader.statistics().calls - before == 5 * limits.READ_HOLDERS

    run_nodes(7, scene, clients=1)
