"""DHT nodes on real hosts: publish, find, replace, withdraw, forge; and no clock or randomness but the ports'."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from overlay.dht import limits
from overlay.dht.node import Dht, DhtConfig
from overlay.dht.records import encode_records, seal_record
from overlay.dht.table import Contact
from overlay.errors import DialError, PeerdError
from overlay.host import Host
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import call
from tests.overlay.network import LOOPBACK, identity, system_ports, until

KEY, OTHER = b"k" * 32, b"o" * 32


def run_nodes(count: int, scene: Callable[[list[Dht], list[Host]], Awaitable[None]], clients: int = 0) -> None:
    """``count`` nodes, the last ``clients`` of which only ask; each joins through the first."""

    async def main() -> None:
        async with asyncio.timeout(40), AsyncExitStack() as stack:
            nodes: list[Dht] = []
            hosts: list[Host] = []
            for number in range(1, count + 1):
                ports = system_ports()
                host = await stack.enter_async_context(Host(identity(number), ports))
                await host.listen(LOOPBACK)
                node = await stack.enter_async_context(Dht(host, ports, DhtConfig(server=number <= count - clients)))
                if nodes:
                    assert await node.bootstrap([(None, hosts[0].addresses)]) == 1
                nodes.append(node)
                hosts.append(host)
            await scene(nodes, hosts)

    asyncio.run(main())


async def values(node: Dht, key: bytes = KEY) -> list[bytes]:
    return [record.value for record in await node.get(key)]


async def until_values(node: Dht, wanted: list[bytes], key: bytes = KEY) -> None:
    async with asyncio.timeout(10):
        while await values(node, key) != wanted:
            await asyncio.sleep(0.02)


def test_a_network_of_one_finds_its_own_record() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        nodes[0].publish(KEY, b"a", b"mine", 60)
        assert await values(nodes[0]) == [b"mine"]
        assert not nodes[0].ready

    run_nodes(1, scene)


def test_what_one_publishes_all_find_also_clients_and_all_publishers_of_a_key() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        assert await nodes[1].publish_and_wait(KEY, b"a", b"one", 60) >= 4
        await nodes[2].publish_and_wait(KEY, b"a", b"two", 60)
        await nodes[-1].publish_and_wait(KEY, b"a", b"client's", 60)
        for node in nodes:
            assert sorted(await values(node)) == [b"client's", b"one", b"two"]
            assert await values(node, OTHER) == []

    run_nodes(7, scene, clients=1)


def test_a_later_value_replaces_and_a_withdrawal_removes() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"first", 60)
        await nodes[1].publish_and_wait(KEY, b"a", b"second", 60)
        assert await values(nodes[3]) == [b"second"]
        await nodes[1].withdraw(KEY, b"a")
        for node in nodes:
            assert await values(node) == []

    run_nodes(5, scene)


def test_who_joins_later_finds_what_was_published_before() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        nodes[0].publish(KEY, b"a", b"early", 60)
        async with AsyncExitStack() as stack:
            ports = system_ports()
            host = await stack.enter_async_context(Host(identity(99), ports))
            await host.listen(LOOPBACK)
            late = await stack.enter_async_context(Dht(host, ports))
            await late.bootstrap([(hosts[1].peer_id, hosts[1].addresses)])
            assert await values(late) == [b"early"]

    run_nodes(3, scene)


def test_clients_are_never_contacts() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[-1].get(KEY)
        await nodes[0].get(KEY)
        assert all(peer != hosts[-1].peer_id for node in nodes for peer, _ in node.known_peers())

    run_nodes(4, scene, clients=1)


def test_a_record_in_anothers_name_is_not_taken_and_a_forged_one_never() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        thief, holder, reader = hosts[1], hosts[2], nodes[3]
        absent = seal_record(identity(77), KEY, b"a", 1, 60, b"of somebody who is not here")
        real = seal_record(thief.identity, KEY, b"b", 1, 60, b"x")
        packed = encode_records([absent]) + b""
        forged = encode_records([real]).replace(b"x", b"y")
        for body in (packed, forged):
            part = Part("records", "uint8", (len(body),), body)
            try:
                await call(
                    thief, holder.peer_id, "/peerd/dht/1", Message("store", {}, (part,)), addresses=holder.addresses
                )
            except PeerdError:
                continue
        while any(" check " in task.get_name() for task in asyncio.all_tasks()):
            await asyncio.sleep(0)  # the holder asks the publisher that the thief named, who isn't there
        assert nodes[2].statistics().stored == 0
        assert await values(reader) == []

    run_nodes(4, scene)


def test_answers_survive_a_holder_that_dies() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[1].publish_and_wait(KEY, b"a", b"kept", 60)
        for listener in hosts[0]._listeners:
            listener.close()
        for connection in hosts[0].connections():
            connection.close_nowait()
        assert await values(nodes[4]) == [b"kept"]

    run_nodes(6, scene)


def test_nothing_reads_a_clock_or_draws_but_through_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*arguments: object, **named: object) -> float:
        raise AssertionError("read past the ports")

    for name in ("random", "randint", "choice", "shuffle", "getrandbits", "uniform", "sample", "randrange"):
        monkeypatch.setattr(random, name, poisoned)

    class PoisonedTime:
        """`time` as the DHT and the package under it see it."""

        def __getattr__(self, name: str) -> object:
            return poisoned

    import kademlia.routing

    monkeypatch.setattr(kademlia.routing, "time", PoisonedTime())
    shells, cores = (
        ("node", "lookup", "protocol", "following", "offering"),
        ("table", "store", "records", "publishing", "freshness", "acquaintances", "pages", "neighbourhoods"),
    )
    for module in (*shells, *cores):
        loaded = __import__(f"overlay.dht.{module}", fromlist=["*"])
        assert not hasattr(loaded, "time")
        assert not hasattr(loaded, "random")

    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        await nodes[3].publish_and_wait(KEY, b"a", b"timeless", 60)
        assert await values(nodes[5]) == [b"timeless"]
        await nodes[3].withdraw(KEY, b"a")
        await until_values(nodes[6], [])

    run_nodes(8, scene)


def test_a_server_that_asks_is_known_by_where_it_says_it_is_without_a_question_back() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        asked, asker, client = nodes
        calls = asked.statistics().calls
        await until(lambda: {peer for peer, _ in asked.known_peers()} == {hosts[1].peer_id})
        assert asked.statistics().calls == calls
        assert asker.ready and client.ready

    run_nodes(3, scene, clients=1)


def test_a_contact_that_vanished_is_tried_again_and_its_neighbourhood_looked_at() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        one, other = nodes[0], Contact(hosts[1].peer_id, hosts[1].addresses)
        await until(lambda: one.ready)
        one.call_ended(other, DialError("It is dark there."))
        assert not one.ready
        one.upkeep(hosts[0].ports.clock.now() + limits.LOST_RETRY_S + 1)
        await until(lambda: one.ready)

    run_nodes(2, scene)


def test_what_could_not_be_dialled_a_moment_ago_does_not_come_in_by_asking() -> None:
    async def scene(nodes: list[Dht], hosts: list[Host]) -> None:
        one, book = nodes[0], hosts[0].address_book
        await until(lambda: one.ready)
        one.call_ended(Contact(hosts[1].peer_id), DialError("It is dark there."))
        for address in book.addresses(hosts[1].peer_id, hosts[0].ports.clock.now()):
            book.failed(address, hosts[0].ports.clock.now() + limits.LOST_RETRY_S)
        one.heard_from(hosts[1].peer_id, hosts[1].addresses)
        assert not one.ready

    run_nodes(2, scene)
