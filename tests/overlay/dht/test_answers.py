"""What liars answer, and what becomes of holders that hold too little: real hosts, one of them hostile."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from kademlia.node import Node

from overlay import limits as overlay_limits
from overlay.dht import limits
from overlay.dht.lookup import Found
from overlay.dht.node import Dht, DhtConfig
from overlay.dht.protocol import DHT, _contact
from overlay.dht.records import Record, encode_records, location_of, seal_record
from overlay.dht.store import RecordStore
from overlay.dht.table import Contact
from overlay.errors import DialError
from overlay.host import Host
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call, serve_unary
from tests.overlay.dht.test_node import KEY, run_nodes, until_values, values
from tests.overlay.network import LOOPBACK, identity, system_ports, until


@dataclass
class Standing:
    """A listener of which only the addresses are looked at."""

    addresses: tuple[Multiaddr, ...]

    def close(self) -> None:
        """Nothing is open."""


class Pages:
    """A holder that gives these answers, one after the other: what is in each besides records, and the records."""

    def __init__(self, pages: list[tuple[dict[str, Any], list[Record]]]) -> None:
        self._pages = pages
        self.since: list[object] = []
        """After which cursors it was asked."""

    async def _answer(self, peer: PeerId, request: Message) -> Message:
        header, records = self._pages[len(self.since)]
        self.since.append(request.header.get("since"))
        packed = encode_records(records)
        return Message("value", {"nodes": [], **header}, (Part("records", "uint8", (len(packed),), packed),))

    async def asked_by(self, nodes: list[Dht], hosts: list[Host]) -> Found:
        """What the second node reads when the first answers so."""
        serve_unary(hosts[0], DHT, {"find_value": self._answer})
        found = await nodes[1]._protocol.call_find_value(Contact(hosts[0].peer_id), KEY, Node(location_of(KEY)))
        assert found is not None
        return found


NOBODY_AT = Multiaddr.parse("/ip4/127.0.0.1/tcp/9").encode()
STRANGERS = [[identity(number).peer_id.multihash, [NOBODY_AT]] for number in range(1000, 1003)]


@pytest.mark.parametrize(
    "nodes",
    [
        None,
        7,
        "nodes",
        {},
        [[]],
        [[b"", []]],
        [["text", [NOBODY_AT]]],
        [[b"\x00" * 38, [NOBODY_AT]]],
        [[STRANGERS[0][0], []]],
        [[STRANGERS[0][0], [b"no address", 5, None]]],
        [[STRANGERS[0][0], {"a": 1}], None, 3, "x", [1, 2, 3]],
        STRANGERS * 100,
        [[identity(1).peer_id.multihash, [NOBODY_AT]]],
    ],
    ids=lambda value: repr(value)[:24],
)
@pytest.mark.parametrize("packed", [None, b"", b"\xc1", b"\x93\x01\xa1x\xc0", b"\x91\xc4\x02no"])
def test_a_liar_among_the_closest_hides_nothing(nodes: Any, packed: bytes | None) -> None:
    parts = () if packed is None else (Part("records", "uint8", (len(packed),), packed),)

    async def lie(peer: PeerId, request: Message) -> Message:
        return Message("value", {"nodes": nodes, "outcomes": nodes}, parts)

    async def main() -> None:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            hosts = []
            for number in (1, 2, 3):
                hosts.append(await stack.enter_async_context(Host(identity(number), system_ports())))
                await hosts[-1].listen(LOOPBACK)
            serve_unary(hosts[2], DHT, dict.fromkeys(("ping", "find_node", "find_value", "store"), lie))
            honest = await stack.enter_async_context(Dht(hosts[0], hosts[0].ports, DhtConfig()))
            reader = await stack.enter_async_context(Dht(hosts[1], hosts[1].ports, DhtConfig()))
            await honest.publish_and_wait(KEY, b"a", b"true", 60)
            meetings = [(host.peer_id, host.addresses) for host in (hosts[0], hosts[2])]
            assert await reader.bootstrap(meetings) == 2
            assert await values(reader) == [b"true"]

    asyncio.run(main())


def test_contacts_with_huge_addresses_do_not_break_the_answers_that_name_them() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        huge = [
            Multiaddr((("dns", "a" * 250), ("tcp", str(port)), *[("p2p", str(hosts[1].peer_id))] * 13))
            for port in range(1, 1 + limits.ADDRESSES_PER_CONTACT)
        ]
        for number in range(100, 100 + limits.KSIZE):
            nodes[0].call_ended(Contact(identity(number).peer_id, huge), None)
        found = await nodes[1]._protocol.call_find_node(Contact(hosts[0].peer_id), Contact(hosts[1].peer_id))
        assert found is not None

    run_nodes(2, scene)


def test_only_good_records_of_the_key_that_was_asked_for_are_read_from_an_answer() -> None:
    good = seal_record(identity(50), KEY, b"a", 1, 60, b"good")
    other = seal_record(identity(50), b"another key", b"a", 9, 60, b"of another key")
    forged = encode_records([seal_record(identity(50), KEY, b"c", 1, 60, b"forged")]).replace(b"forged", b"FORGED")
    packed = b"\x93" + encode_records([good])[1:] + encode_records([other])[1:] + forged[1:]

    async def answer(peer: PeerId, request: Message) -> Message:
        return Message("value", {"nodes": []}, (Part("records", "uint8", (len(packed),), packed),))

    async def main() -> None:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            liar, host = (Host(identity(number), system_ports()) for number in (1, 2))
            for each in (liar, host):
                await stack.enter_async_context(each)
                await each.listen(LOOPBACK)
            serve_unary(liar, DHT, dict.fromkeys(("ping", "find_node", "find_value", "store"), answer))
            reader = await stack.enter_async_context(Dht(host, host.ports, DhtConfig()))
            await reader.bootstrap([(liar.peer_id, liar.addresses)])
            assert await values(reader) == [b"good"]

    asyncio.run(main())


def test_a_holder_that_lost_a_record_is_told_and_takes_it_from_its_publisher() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", 60)
        forgetful = nodes[2]
        forgetful._store = RecordStore()
        assert await values(nodes[3]) == [b"kept"]
        await until(lambda: forgetful.statistics().stored == 1)
        (record,) = forgetful._store.get(KEY, hosts[2].ports.clock.now())
        assert record.publisher == hosts[1].peer_id

    run_nodes(4, scene)


def test_an_old_version_brought_by_a_third_party_does_not_undo_a_withdrawal() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"old", 60)
        (old,) = await nodes[3].get(KEY)
        await nodes[1].withdraw(KEY, b"a")
        nodes[2]._store = RecordStore()
        nodes[2].offer(old, hosts[3].peer_id)
        await until(lambda: nodes[2].statistics().stored == 1)
        await until_values(nodes[3], [])
        (held,) = nodes[2]._store.get(KEY, hosts[2].ports.clock.now())
        assert held.is_withdrawn and held.sequence > old.sequence

    run_nodes(4, scene)


def test_who_asks_too_much_is_told_so_and_the_count_is_bounded() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        sender = hosts[1]
        made = [
            seal_record(sender.identity, KEY, bytes([number]), 1, 60, b"v")
            for number in range(limits.STORES_PER_PEER_PER_MINUTE + 20)
        ]
        outcomes = [nodes[0].offer(record, sender.peer_id)[0].value for record in made]
        assert outcomes.count("stored") <= limits.STORES_PER_PEER_PER_MINUTE
        assert outcomes[-1] == "rate"

    run_nodes(2, scene)


@pytest.mark.parametrize(
    "at",
    [None, 7, "text", {}, [], [None, 3], [b"no address"], [b"x" * 10_000], [[NOBODY_AT]], [Multiaddr.parse("/ip4/1.2.3.4/udp/9").encode()]],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_who_says_no_address_with_its_question_is_answered_and_stays_unknown(at: Any) -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        answer = await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": at}))
        assert answer.kind == "pong"
        assert not nodes[0].ready

    run_nodes(2, scene, clients=1)


def test_of_the_addresses_that_come_with_a_question_so_many_are_kept() -> None:
    at = [Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}").encode() for port in range(1, 100)]

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": at}))
        ((peer, known),) = nodes[0].known_peers()
        assert peer == hosts[1].peer_id
        assert len(known) == limits.ADDRESSES_PER_CONTACT

    run_nodes(2, scene, clients=1)


def test_a_private_address_in_a_question_from_the_public_net_is_no_place_to_be_dialled_at() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        far = hosts[0].connection(hosts[1].peer_id)
        assert far is not None
        far.remote_address = Multiaddr.parse("/ip4/5.6.7.8/tcp/4001")
        private, public = (Multiaddr.parse(f"/ip4/{ip}/tcp/4001") for ip in ("192.168.1.5", "5.6.7.9"))
        await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": [private.encode()]}))
        assert not nodes[0].ready
        await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": [private.encode(), public.encode()]}))
        assert nodes[0].known_peers() == [(hosts[1].peer_id, (public,))]

    run_nodes(2, scene, clients=1)


def test_a_contact_that_asks_from_elsewhere_is_found_there() -> None:
    moved = Multiaddr.parse("/ip4/127.0.0.1/tcp/77")

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await until(lambda: nodes[0].ready)
        await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": [moved.encode()]}))
        ((_, known),) = nodes[0].known_peers()
        assert known[0] == moved

    run_nodes(2, scene)


def test_where_an_asker_is_stays_known_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    at = Multiaddr.parse("/ip4/127.0.0.1/tcp/77")

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        question = Message("ping", {"at": [at.encode()]})
        await call(hosts[1], hosts[0].peer_id, DHT, question)
        clock, peer = hosts[0].ports.clock, hosts[1].peer_id
        later = clock.now() + overlay_limits.ADDRESS_LIFE_S + 1
        monkeypatch.setattr(type(clock), "now", lambda _: later)
        assert hosts[0].address_book.addresses(peer, later) == ()
        nodes[0].heard_from(peer, [at])
        assert hosts[0].address_book.addresses(peer, later) == (at,)

    run_nodes(2, scene, clients=1)


def test_long_addresses_that_come_with_a_question_are_kept_nowhere() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        before = _contact.cache_info().currsize
        for number in range(5):
            long = number.to_bytes(4, "big") * 2000
            await call(hosts[1], hosts[0].peer_id, DHT, Message("ping", {"at": [long]}))
        assert _contact.cache_info().currsize <= before + 1

    run_nodes(2, scene, clients=1)


def test_who_is_known_by_identify_comes_in_by_its_public_addresses_where_it_is_far() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await until(lambda: nodes[0].ready)
        nodes[0].call_ended(Contact(hosts[1].peer_id), DialError("It is dark there."))
        far = hosts[0].connection(hosts[1].peer_id)
        assert far is not None
        far.remote_address = Multiaddr.parse("/ip4/5.6.7.8/tcp/4001")
        book, now = hosts[0].address_book, hosts[0].ports.clock.now()
        private, public = (Multiaddr.parse(f"/ip4/{ip}/tcp/4001") for ip in ("192.168.1.5", "5.6.7.9"))
        book.identified(hosts[1].peer_id, [private], (DHT,), 1 << 60, now)
        nodes[0]._introduced(hosts[1].peer_id)
        assert not nodes[0].ready
        book.identified(hosts[1].peer_id, [private, public], (DHT,), 1 << 60, now)
        nodes[0]._introduced(hosts[1].peer_id)
        assert nodes[0].ready

    run_nodes(2, scene)


def test_public_addresses_are_named_before_a_machines_many_bridges() -> None:
    bridges = [Multiaddr.parse(f"/ip4/172.17.{number}.1/tcp/4001") for number in range(12)]
    public = Multiaddr.parse("/ip4/5.6.7.8/tcp/4001")

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        hosts[0]._listeners.append(Standing((*bridges, public)))
        at = nodes[0]._protocol._at()
        assert at[0] == public.encode()
        assert len(at) == limits.ADDRESSES_PER_CONTACT

    run_nodes(1, scene)


def test_a_node_that_serves_no_more_names_no_address() -> None:
    heard: list[object] = []

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        async def hear(_: PeerId, request: Message) -> Message:
            heard.append(request.header.get("at"))
            return Message("pong", {})

        serve_unary(hosts[0], DHT, {"ping": hear})
        there = Contact(hosts[0].peer_id, hosts[0].addresses)
        assert await nodes[1]._protocol.call_ping(there)
        nodes[1]._protocol.stop()
        assert await nodes[1]._protocol.call_ping(there)

    run_nodes(2, scene)
    assert heard[0]
    assert heard[1] is None


@pytest.mark.parametrize(
    ("later", "wanted_s"),
    [
        (1, 1.0),
        (1.25, 1.25),
        (1e9, limits.LATER_MAX_S),
        (2**63, limits.LATER_MAX_S),
        (float("inf"), limits.LATER_MAX_S),
        (1e-9, limits.LATER_MIN_S),
        (float("nan"), 0.0),
        (float("-inf"), 0.0),
        (-1, 0.0),
        (0, 0.0),
        (True, 0.0),
        ("2", 0.0),
        (b"2", 0.0),
        ([2], 0.0),
        (None, 0.0),
    ],
    ids=repr,
)
def test_when_a_holder_says_to_be_asked_again_is_neither_at_once_nor_in_a_year(later: object, wanted_s: float) -> None:
    record = seal_record(identity(50), KEY, b"a", 1, 60, b"told")
    holder = Pages([({"later": later}, [record])])

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        found = await holder.asked_by(nodes, hosts)
        assert found.later_s == wanted_s
        assert found.records == (record,)

    run_nodes(2, scene, clients=1)


def test_a_holder_that_says_later_is_asked_for_no_other_page_whatever_else_it_says() -> None:
    records = [seal_record(identity(50), KEY, bytes([number]), 1, 60, b"told") for number in range(2)]
    holder = Pages([({"later": 1.0, "cursor": b"1", "more": True}, records[:1]), ({"cursor": b"2"}, records[1:])])

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        found = await holder.asked_by(nodes, hosts)
        assert holder.since == [b""]
        assert (found.records, found.cursor, found.later_s) == (tuple(records[:1]), b"1", 1.0)

    run_nodes(2, scene, clients=1)


def test_of_a_holder_that_says_later_after_some_pages_those_pages_and_their_cursor_are_kept() -> None:
    records = [seal_record(identity(50), KEY, bytes([number]), 1, 60, b"told") for number in range(3)]
    pages = [
        ({"cursor": b"1", "more": True}, records[:1]),
        ({"cursor": b"2", "more": True}, records[1:2]),
        ({"later": 1.0, "cursor": b"3", "more": True}, records[2:]),
    ]
    holder = Pages([*pages, ({"cursor": b"4"}, [])])

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        found = await holder.asked_by(nodes, hosts)
        assert holder.since == [b"", b"1", b"2"]
        assert (found.records, found.cursor, found.later_s) == (tuple(records[:2]), b"2", 1.0)
        assert len(found.left_s) == len(found.records)

    run_nodes(2, scene, clients=1)
