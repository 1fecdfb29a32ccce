"""The simulated internet: deaths, power cuts, sleep, partitions, and what each end hears of them."""

from __future__ import annotations

import asyncio

import pytest

from netsim.fabric import Card
from overlay.errors import DialError
from overlay.multiaddr import tcp_address
from tests.netsim.three_hosts import ADDRESSES, Ear, World, simulate


def test_closing_delivers_what_was_written_and_both_ends_hear_it_once() -> None:
    async def main() -> None:
        one, other = await World().pair()
        one.pipe.write(b"last words")
        one.pipe.close()
        one.pipe.close()
        assert one.pipe.is_closing()
        await asyncio.sleep(1)
        assert other.heard == b"last words"
        assert (one.ended, other.ended, other.eofs) == ([None], [None], 1)

    simulate(main)


def test_aborting_drops_what_the_kernel_didnt_take_and_the_rest_arrives() -> None:
    async def main() -> None:
        one, other = await World().pair()
        one.pipe.write(bytes(1_000_000))
        assert one.pipe.get_write_buffer_size() > 0
        one.pipe.abort()
        one.pipe.write(b"ignored")
        await asyncio.sleep(5)
        assert 0 < len(other.heard) < 1_000_000
        assert (one.ended, other.ended) == ([None], [None])

    simulate(main)


def test_closing_with_unread_bytes_resets_the_other_end() -> None:
    async def main() -> None:
        one, other = await World().pair()
        one.pipe.pause_reading()
        other.pipe.write(b"never read")
        await asyncio.sleep(1)
        one.pipe.close()
        await asyncio.sleep(1)
        assert one.heard == b""
        assert isinstance(other.ended[0], ConnectionResetError)

    simulate(main)


def test_bytes_for_a_closed_end_are_answered_with_a_reset() -> None:
    async def main() -> None:
        one, other = await World().pair()
        other.pipe.pause_reading()  # so that it doesn't see the end
        one.pipe.close()
        await asyncio.sleep(1)
        assert (one.ended, other.ended) == ([None], [])
        other.pipe.write(b"too late")
        await asyncio.sleep(1)
        other.pipe.write(b"now it hears of it")
        await asyncio.sleep(1)
        assert isinstance(other.ended[0], BrokenPipeError)

    simulate(main)


def test_a_killed_process_leaves_its_last_words_and_an_end_and_after_that_resets() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        second, _ = await world.pair("a", "b", 4002)
        listener = await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4003), Ear)
        other.pipe.write(b"last words")
        second.pipe.write(b"in flight when it dies")
        world.fabric.process_died("b")
        await asyncio.sleep(1)
        assert one.heard == b"last words"
        assert (one.eofs, one.ended) == (1, [None])
        assert isinstance(second.ended[0], ConnectionResetError | None)
        assert isinstance(other.ended[0], ConnectionAbortedError)  # as nobody would who is muted
        with pytest.raises(DialError, match="refused"):
            await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4003), Ear)
        listener.close()
        assert world.fabric.connection_count("a") == world.fabric.connection_count("b") == 0

    simulate(main)


def test_a_dead_processs_transport_reaches_nobody() -> None:
    async def main() -> None:
        world = World()
        transport = world.fabric.transport("a")
        one, other = await world.pair()
        world.fabric.process_died("a")
        with pytest.raises(DialError, match="dead"):
            await transport.dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        one.pipe.write(b"from beyond")
        one.pipe.close()
        await asyncio.sleep(1)
        assert other.heard == b""
        assert world.fabric.transport("a").can_dial(tcp_address(ADDRESSES["b"], 4001))

    simulate(main)


def test_a_host_without_power_leaves_the_other_end_half_open_until_its_time_outs_are_over() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        world.fabric.power_off("b")
        began = world.loop.time()
        await asyncio.sleep(4000)
        assert one.ended == []  # it said nothing, so it learns nothing
        one.pipe.write(b"anybody there?")
        began = world.loop.time()
        while not one.ended:
            await asyncio.sleep(1)
        assert isinstance(one.ended[0], TimeoutError)
        # 0.2 s over the round trip of 0.1 s, doubled 15 times up to 120 s: 0.3 + 0.6 + ... + 76.8 + 7 * 120
        assert world.loop.time() - began == pytest.approx(153.3 + 7 * 120, rel=0.05)
        assert bytes(other.heard) == b""

    simulate(main)


def test_a_host_that_got_its_power_back_answers_old_connections_with_a_reset() -> None:
    async def main() -> None:
        world = World()
        one, _ = await world.pair()
        world.fabric.power_off("b")
        await asyncio.sleep(10)
        one.pipe.write(b"anybody there?")
        await asyncio.sleep(2)
        assert one.ended == []
        world.fabric.power_on("b")
        await asyncio.sleep(10)
        assert isinstance(one.ended[0], ConnectionResetError)
        await world.pair(port=4002)

    simulate(main)


@pytest.mark.parametrize("both_ways", [True, False])
def test_what_a_partition_swallows_arrives_once_it_is_healed(both_ways: bool) -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        one.pipe.write(b"in flight, ")
        number = world.fabric.partition(["a"], ["b"], both_ways=both_ways)
        one.pipe.write(b"and after it")
        other.pipe.write(b"the other way")
        await asyncio.sleep(5)
        assert other.heard == b""
        assert bytes(one.heard) == (b"" if both_ways else b"the other way")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await world.fabric.transport("b").dial(tcp_address(ADDRESSES["a"], 1), Ear)
        world.fabric.heal(number)
        await asyncio.sleep(60)
        assert (bytes(other.heard), bytes(one.heard)) == (b"in flight, and after it", b"the other way")
        assert one.ended == other.ended == []
        with pytest.raises(DialError, match="refused"):
            await world.fabric.transport("b").dial(tcp_address(ADDRESSES["a"], 1), Ear)

    simulate(main)


def test_partitions_add_up_and_heal_one_by_one() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        first = world.fabric.partition(["a"], ["b", "c"])
        second = world.fabric.partition(["b"], ["a"], both_ways=False)
        world.fabric.heal(first)
        one.pipe.write(b"there")
        other.pipe.write(b"back")
        await asyncio.sleep(30)
        assert (bytes(other.heard), bytes(one.heard)) == (b"there", b"")
        world.fabric.heal(second)
        world.fabric.heal(second)
        await asyncio.sleep(100)
        assert bytes(one.heard) == b"back"

    simulate(main)


def test_a_reset_and_a_cut_at_a_byte_are_heard_at_both_ends() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        world.fabric.reset("b", "a")
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert [type(error) for error in one.ended + other.ended] == [ConnectionResetError] * 2
        world.fabric.cut_after("a", "b", 1000)
        one, other = await world.pair(port=4002)
        one.pipe.write(bytes(999))
        await asyncio.sleep(1)
        assert (len(other.heard), other.ended) == (999, [])
        one.pipe.write(bytes(100))
        await asyncio.sleep(1)
        assert len(other.heard) == 1000
        assert [type(error) for error in one.ended + other.ended] == [ConnectionResetError] * 2

    simulate(main)


def test_a_frozen_process_hears_nothing_while_its_kernel_accepts_acknowledges_and_fills_its_window() -> None:
    async def main() -> None:
        world = World(card=Card(receive_window_bytes=100_000))
        loop = asyncio.get_running_loop()
        accepted: list[Ear] = []

        def accept() -> Ear:
            accepted.append(Ear())
            return accepted[-1]

        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 9), accept)
        one, other = await world.pair()
        loop.freeze("b")  # type: ignore[attr-defined]
        new = await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 9), Ear)
        assert isinstance(new, Ear)
        new.pipe.write(b"hello")
        sent = bytes(range(256)) * 4000
        one.pipe.write(sent)
        await asyncio.sleep(3600)
        assert (bytes(other.heard), accepted, one.ended) == (b"", [], [])
        assert one.pipe.get_write_buffer_size() == len(sent) - 100_000 - Card().notsent_lowat_bytes
        loop.thaw("b")  # type: ignore[attr-defined]
        await asyncio.sleep(10)
        assert bytes(other.heard) == sent
        assert bytes(accepted[0].heard) == b"hello"
        one.pipe.close()
        await asyncio.sleep(1)
        assert other.ended == [None]

    simulate(main)


def test_a_sleeping_machine_neither_hears_nor_answers_and_loses_nothing() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        world.fabric.sleep("b")
        one.pipe.write(b"asleep?")
        await asyncio.sleep(100)
        assert other.heard == b""
        world.fabric.wake("b")
        await asyncio.sleep(200)
        assert (bytes(other.heard), one.ended) == (b"asleep?", [])

    simulate(main)
