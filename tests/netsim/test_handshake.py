"""Dials and listeners, with boxes between them and without."""

from __future__ import annotations

import asyncio

import pytest

from netsim.nat import NatBox, NatKind, site
from overlay.errors import DialError
from overlay.multiaddr import tcp_address
from overlay.transport.tcp import BACKLOG
from tests.netsim.three_hosts import ADDRESSES, Ear, World, simulate


def test_a_dial_costs_a_round_trip_and_bytes_the_way() -> None:
    async def main() -> None:
        world = World()
        began = world.loop.time()
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        one = await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        assert world.loop.time() - began == pytest.approx(0.1)
        assert accepted.made == 0
        one.pipe.write(b"hello")
        await asyncio.sleep(1)
        assert (one.made, accepted.made, bytes(accepted.heard)) == (1, 1, b"hello")
        assert accepted.times[0] - began == pytest.approx(0.15)
        assert one.pipe.get_extra_info("peername") == (ADDRESSES["b"], 4001)
        assert accepted.pipe.get_extra_info("peername") == one.pipe.get_extra_info("sockname")

    simulate(main)


def test_nobody_listening_refuses_after_a_round_trip_and_nobody_there_says_nothing() -> None:
    async def main() -> None:
        world = World()
        began = world.loop.time()
        with pytest.raises(DialError, match="refused"):
            await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 1), Ear)
        assert world.loop.time() - began == pytest.approx(0.1)
        began = world.loop.time()
        with pytest.raises(DialError, match="timed out"):
            await world.fabric.transport("a").dial(tcp_address("99.9.9.9", 1), Ear)
        assert world.loop.time() - began == pytest.approx(127)
        world.fabric.power_off("b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)

    simulate(main)


def test_a_lost_syn_is_sent_again_after_a_second() -> None:
    async def main() -> None:
        world = World()
        number = world.fabric.partition(["a"], ["b"])
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        began = world.loop.time()
        world.loop.call_later(2.0, world.fabric.heal, number)
        await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert world.loop.time() - began == pytest.approx(3.1)

    simulate(main)


def test_a_dial_that_was_given_up_leaves_nothing_behind() -> None:
    async def main() -> None:
        world = World()
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        for patience in (0.01, 0.07, 0.11):
            dialled = asyncio.get_running_loop().create_task(
                world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
            )
            await asyncio.sleep(patience)
            dialled.cancel()
            await asyncio.wait([dialled])
            if not dialled.cancelled():
                ear = dialled.result()
                assert isinstance(ear, Ear)
                ear.pipe.abort()
            await asyncio.sleep(5)
            assert world.fabric.connection_count("a") == world.fabric.connection_count("b") == 0

    simulate(main)


def test_a_listeners_backlog_is_bounded_and_half_made_connections_are_forgotten() -> None:
    async def main() -> None:
        world = World()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), Ear)
        loop = asyncio.get_running_loop()
        transport = world.fabric.transport("a")
        dials = [loop.create_task(transport.dial(tcp_address(ADDRESSES["b"], 4001), Ear)) for _ in range(300)]
        await asyncio.sleep(0.06)  # the SYNs have landed
        assert world.fabric.connection_count("b") == BACKLOG
        world.fabric.power_off("a")
        for dial in dials:
            dial.cancel()
        await asyncio.wait(dials)
        await asyncio.sleep(70)
        assert world.fabric.connection_count("b") == 0
        ear = await world.fabric.transport("c").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(ear, Ear)
        assert ear.made == 1

    simulate(main)


def boxed(world: World, name: str, kind: str, number: int) -> str:
    """A host behind a box; gives its public address."""
    public, private = f"30.0.0.{number}", f"10.0.0.{number}"
    address, boxes = site(kind, public, private, 4001)
    world.fabric.add_host(name, address, nat=boxes)
    return public


def test_a_host_behind_a_box_dials_out_is_seen_by_the_boxs_address_and_cant_be_dialled() -> None:
    async def main() -> None:
        world = World()
        public = boxed(world, "home", "port-restricted", 1)
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        await world.fabric.transport("home").listen(tcp_address("0.0.0.0", 4001), Ear)
        one = await world.fabric.transport("home").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        one.pipe.write(b"out")
        await asyncio.sleep(1)
        assert accepted.heard == b"out"
        assert accepted.pipe.get_extra_info("peername")[0] == public
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await world.fabric.transport("b").dial(tcp_address(public, 4001), Ear)
        forwarded = boxed(world, "gamer", "forwarded", 2)
        await world.fabric.transport("gamer").listen(tcp_address("0.0.0.0", 4001), Ear)
        await world.fabric.transport("home").dial(tcp_address(forwarded, 4001), Ear)

    simulate(main)


@pytest.mark.parametrize(
    ("one", "other", "meets"),
    [
        ("port-restricted", "port-restricted", True),
        ("full-cone", "symmetric", True),
        ("port-restricted", "symmetric", False),
    ],
)
def test_two_dials_that_cross_make_one_connection_where_both_boxes_let_them(one: str, other: str, meets: bool) -> None:
    async def main() -> None:
        world = World()
        publics = {
            name: boxed(world, name, kind, number)
            for number, (name, kind) in enumerate({"x": one, "y": other}.items(), 1)
        }
        tries = []
        for name, target in (("x", "y"), ("y", "x")):
            transport = world.fabric.transport(name)
            await transport.listen(tcp_address("0.0.0.0", 4001), Ear)
            tries.append(
                asyncio.get_running_loop().create_task(
                    transport.dial(tcp_address(publics[target], 4001), Ear, local_port=4001)
                )
            )
        done, pending = await asyncio.wait(tries, timeout=30)
        if not meets:
            assert not done
            for task in pending:
                task.cancel()
            await asyncio.wait(pending)
            return
        assert len(done) >= 1
        first = next(task for task in tries if task in done).result()
        assert isinstance(first, Ear)
        first.pipe.write(b"hello")
        await asyncio.sleep(1)
        assert world.fabric.connection_count("x") == world.fabric.connection_count("y") == 1
        for task in pending:
            task.cancel()

    simulate(main)


def test_a_box_forgets_a_connection_that_was_silent_for_two_hours() -> None:
    async def main() -> None:
        world = World()
        boxed(world, "home", "port-restricted", 1)
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        one = await world.fabric.transport("home").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        for pause in (7000, 7000, 7600):
            one.pipe.write(b"x")
            await asyncio.sleep(pause)
        accepted.pipe.write(b"still there?")
        await asyncio.sleep(500)
        assert (bytes(accepted.heard), bytes(one.heard)) == (b"xxx", b"")
        await asyncio.sleep(1000)
        assert isinstance(accepted.ended[0], TimeoutError)

    simulate(main)


def test_hosts_behind_one_box_meet_by_their_own_addresses() -> None:
    async def main() -> None:
        world = World()
        box = NatBox(NatKind.SYMMETRIC, "30.0.0.9")
        for number, name in enumerate(("x", "y"), 1):
            world.fabric.add_host(name, f"10.0.0.{number}", nat=(box,))
        accepted = Ear()
        await world.fabric.transport("y").listen(tcp_address("0.0.0.0", 4001), lambda: accepted)
        one = await world.fabric.transport("x").dial(tcp_address("10.0.0.2", 4001), Ear)
        assert isinstance(one, Ear)
        one.pipe.write(b"neighbour")
        await asyncio.sleep(9000)
        accepted.pipe.write(b"hello")
        await asyncio.sleep(1)
        assert (bytes(accepted.heard), bytes(one.heard)) == (b"neighbour", b"hello")
        assert box.mapping_count == 0

    simulate(main)
