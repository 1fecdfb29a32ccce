"""A holder's long answers on a link of the simulator: what counts as under way, for how long, and who is put off."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import cast

import pytest
from kademlia.node import Node

from netsim.fabric import Path
from netsim.loop import run
from overlay.connection import Connection
from overlay.dht import limits
from overlay.dht.lookup import Found
from overlay.dht.node import Dht
from overlay.dht.protocol import DHT, LEAVING
from overlay.dht.records import location_of
from overlay.dht.table import Contact
from overlay.host import Host
from overlay.multiaddr import tcp_address
from overlay.stream import Stream
from tests.netsim.small_network import Lines, SmallNetwork
from tests.overlay.network import identity

KEY = b"a busy key"
ADDRESSES = ("28.0.1.1", "28.0.2.1", "28.0.2.2")
VALUE_BYTES = 15 << 10
PAGES = 2


class Scene:
    """A holder of two pages of records, and two readers of one address group."""

    def __init__(self, network: SmallNetwork, hosts: list[Host], nodes: list[Dht]) -> None:
        self.network = network
        self.hosts = hosts
        self.holder, *self.readers = nodes
        self.under_way = self.holder._protocol._under_way
        for number in range(PAGES * limits.PAGE_BYTES // VALUE_BYTES - 3):
            self.holder.publish(KEY, bytes([number]), bytes(VALUE_BYTES), 3600)

    async def ask(self, reader: int = 0) -> Found | None:
        holder = Contact(self.hosts[0].peer_id, self.hosts[0].addresses)
        return await self.readers[reader]._protocol.call_find_value(holder, KEY, Node(location_of(KEY)))

    async def connection(self, reader: int = 0) -> Connection:
        """The reader's end of the one to the holder."""
        return await self.hosts[1 + reader].connect(self.hosts[0].peer_id, self.hosts[0].addresses)


def scene_of(play: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(1000), AsyncExitStack() as stack:
            network = SmallNetwork(Lines(), Path(delay_s=0.05))
            hosts, nodes = [], []
            for number, address in enumerate(ADDRESSES, 1):
                ports = network.ports(address)
                hosts.append(await stack.enter_async_context(Host(identity(number), ports)))
                await hosts[-1].listen(tcp_address(address, 4001))
                nodes.append(await stack.enter_async_context(Dht(hosts[-1], ports)))
            await play(Scene(network, hosts, nodes))

    run(main())


def answers_on(connection: Connection) -> list[Stream]:
    """Of the DHT, that haven't gone wholly."""
    streams = [cast(Stream, lane.owner) for lane in connection.session.live_lanes() if not lane.outbound]
    return [stream for stream in streams if stream.protocol == DHT]


def test_a_long_answer_is_under_way_until_it_has_arrived() -> None:
    async def play(scene: Scene) -> None:
        asking = asyncio.create_task(scene.ask())
        seen = 0
        while not asking.done():
            seen = max(seen, len(scene.under_way))
            await asyncio.sleep(0.01)
        found = await asking
        assert found is not None
        assert len(found.records) == PAGES * limits.PAGE_BYTES // VALUE_BYTES - 3
        assert seen == 1
        await asyncio.sleep(0.2)
        assert len(scene.under_way) == 0
        assert scene.holder.statistics().put_off == 0

    scene_of(play)


def test_an_answer_that_nobody_takes_is_dropped_and_counts_no_more_after_a_while() -> None:
    async def play(scene: Scene) -> None:
        await scene.connection()
        await asyncio.sleep(1)
        theirs = scene.hosts[0].connection(scene.hosts[1].peer_id)
        assert theirs is not None
        asking = asyncio.gather(scene.ask(), scene.ask())
        await asyncio.sleep(0.06)
        scene.network._fabric.partition(ADDRESSES[:1], ADDRESSES[1:])
        await asyncio.sleep(1)
        assert [bool(stream.outgoing) for stream in answers_on(theirs)] == [True], "the socket has taken the other one"
        assert len(scene.under_way) == 2
        await asyncio.sleep(limits.ANSWER_LIFE_S)
        assert answers_on(theirs) == [], "nobody waits for the rest"
        assert len(scene.under_way) == 2, "what the socket took is still there"
        assert await asking == [None, None]
        await asyncio.sleep(limits.UNDER_WAY_LIFE_S)
        assert len(scene.under_way) == 0

    scene_of(play)


def test_who_is_put_off_hears_when_to_come_back_and_blames_nobody() -> None:
    async def play(scene: Scene) -> None:
        holder = Contact(scene.hosts[0].peer_id)
        serial = scene.under_way.began(b"another", 2 * limits.UNDER_WAY_BYTES, asyncio.get_running_loop().time())
        found = await scene.ask()
        assert found is not None
        assert limits.LATER_MIN_S <= found.later_s <= limits.LATER_MAX_S
        assert (found.records, found.cursor) == ((), b"")
        assert scene.holder.statistics().put_off == 1
        assert scene.readers[0].statistics().failures == 0
        assert holder.id in [contact.id for contact in scene.readers[0]._table.contacts()]
        scene.under_way.ended(serial, asyncio.get_running_loop().time(), has_arrived=True)
        found = await scene.ask()
        assert found is not None
        assert found.records

    scene_of(play)


@pytest.mark.parametrize("is_private", [True, False])
def test_peers_of_one_address_group_share_its_part_and_those_at_private_addresses_have_their_own(
    is_private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_private:
        monkeypatch.setitem(globals(), "ADDRESSES", ("10.0.1.1", "10.0.2.1", "10.0.2.2"))

    async def play(scene: Scene) -> None:
        for reader in range(2):
            await scene.connection(reader)
        await asyncio.sleep(1)
        askers = {scene.holder._protocol._asker(host.peer_id) for host in scene.hosts[1:]}
        assert len(askers) == (2 if is_private else 1)

    scene_of(play)


def test_those_that_ask_and_leave_at_once_share_one_part_whoever_they_are() -> None:
    """A peer may say go-away with its question: its connection is none of the host's by the time that it is answered."""

    async def play(scene: Scene) -> None:
        for reader in range(2):
            connection = await scene.connection(reader)
            await asyncio.sleep(1)
            connection.leave()
            await asyncio.sleep(0.06)
        askers = [scene.holder._protocol._asker(host.peer_id) for host in scene.hosts[1:]]
        assert askers == [LEAVING, LEAVING]

    scene_of(play)
