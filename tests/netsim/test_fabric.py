"""The simulated internet: dials, deaths, partitions, boxes, and what each end hears of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from netsim.connection import FabricConnection
from netsim.fabric import Card, Fabric, Path
from netsim.loop import UntakenError, run
from netsim.nat import NatBox, NatKind, site
from netsim.trace import Trace
from overlay.errors import DialError
from overlay.multiaddr import tcp_address
from overlay.transport.tcp import BACKLOG

ADDRESSES = {"a": "20.0.0.1", "b": "20.1.0.1", "c": "20.2.0.1"}


class Ear(asyncio.BufferedProtocol):
    """Keeps what it hears, and when."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.times: list[float] = []
        self.ended: list[Exception | None] = []
        self.eofs = 0
        self.paused = 0
        self.made = 0
        self.transport: FabricConnection | None = None
        self._ring = bytearray(256 << 10)

    @property
    def pipe(self) -> FabricConnection:
        assert self.transport is not None
        return self.transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, FabricConnection)
        self.transport = transport
        self.made += 1

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._ring

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self._ring[:nbytes]
        self.times.append(asyncio.get_running_loop().time())

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def eof_received(self) -> bool:
        self.eofs += 1
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.append(error)


class World:
    """Three hosts."""

    def __init__(self, path: Path | None = None, card: Card | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.trace = Trace(self.loop.time)
        self.fabric = Fabric(self.trace, random.Random(7), path or Path(delay_s=0.05))
        for name, address in ADDRESSES.items():
            self.fabric.add_host(name, address, card or Card())

    async def pair(self, one: str = "a", other: str = "b", port: int = 4001) -> tuple[Ear, Ear]:
        accepted: list[Ear] = []

        def accept() -> Ear:
            accepted.append(Ear())
            return accepted[-1]

        listener = await self.fabric.transport(other).listen(tcp_address(ADDRESSES[other], port), accept)
        dialled = await self.fabric.transport(one).dial(tcp_address(ADDRESSES[other], port), Ear)
        await asyncio.sleep(0.2)
        listener.close()
        assert isinstance(dialled, Ear)
        assert len(accepted) == 1
        return dialled, accepted[0]


def simulate(main: Callable[[], Awaitable[None]]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(100_000):
            await main()

    run(guarded())


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


def test_bytes_arrive_in_order() -> None:
    async def main() -> None:
        world = World(Path(delay_s=0.05, jitter_s=0.03, loss=0.02))
        one, other = await world.pair()
        sent = bytes(number % 251 for number in range(1_000_000))
        for start in range(0, len(sent), 777):
            one.pipe.write(sent[start : start + 777])
        await asyncio.sleep(200)
        assert bytes(other.heard) == sent

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


def test_acknowledgements_that_never_come_end_a_connection_whose_bytes_all_arrived() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        world.fabric.set_path("b", "a", Path(delay_s=0.05, is_black_hole=True))
        one.pipe.write(b"heard, and never known to be")
        await asyncio.sleep(500)
        assert (bytes(other.heard), one.ended) == (b"heard, and never known to be", [])
        await asyncio.sleep(1000)
        assert isinstance(one.ended[0], TimeoutError)
        assert other.ended == []

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


def test_a_slow_reader_stops_its_sender_and_starts_it_again() -> None:
    async def main() -> None:
        world = World(card=Card(receive_window_bytes=200_000))
        one, other = await world.pair()
        other.pipe.pause_reading()
        one.pipe.write(bytes(2_000_000))
        assert one.paused == 1
        await asyncio.sleep(60)
        assert len(other.heard) == 0
        assert one.pipe.get_write_buffer_size() == 2_000_000 - 200_000 - Card().notsent_lowat_bytes
        other.pipe.resume_reading()
        await asyncio.sleep(60)
        assert len(other.heard) == 2_000_000
        assert one.paused == 0

    simulate(main)


def test_an_uplink_is_shared_by_bytes_and_a_small_message_waits_for_few_of_anothers() -> None:
    async def main() -> None:
        world = World(card=Card(uplink_bytes_per_s=1_000_000))
        one, bulk = await world.pair()
        two, other_bulk = await world.pair("a", "c")
        three, small = await world.pair("a", "c", 4002)
        began = world.loop.time()
        one.pipe.write(bytes(1_000_000))
        two.pipe.write(bytes(1_000_000))
        await asyncio.sleep(0.5)
        three.pipe.write(b"decode")
        asked = world.loop.time()
        await asyncio.sleep(0.2)
        assert small.times[0] - asked == pytest.approx(0.05, abs=0.005)
        assert len(bulk.heard) == pytest.approx(len(other_bulk.heard), rel=0.05)
        await asyncio.sleep(10)
        assert len(bulk.heard) == len(other_bulk.heard) == 1_000_000
        last = max(bulk.times[-1], other_bulk.times[-1])
        assert last - began == pytest.approx(2.05, abs=0.15)

    simulate(main)


def test_a_downlink_is_shared_by_all_who_send_there() -> None:
    async def main() -> None:
        world = World()
        world.fabric.add_host("d", "20.3.0.1", Card(downlink_bytes_per_s=1_000_000))
        ADDRESSES["d"] = "20.3.0.1"
        pairs = [await world.pair(name, "d", 4001 + number) for number, name in enumerate(("a", "b"))]
        began = world.loop.time()
        for one, _ in pairs:
            one.pipe.write(bytes(1_000_000))
        await asyncio.sleep(30)
        assert [len(other.heard) for _, other in pairs] == [1_000_000, 1_000_000]
        last = max(other.times[-1] for _, other in pairs)
        assert last - began == pytest.approx(2.05, abs=0.4)

    simulate(main)


def test_a_path_with_a_rate_drops_the_tail_of_its_queue_and_carries_nearly_its_rate() -> None:
    async def main() -> None:
        world = World(Path(delay_s=0.01, bytes_per_s=1_000_000, queue_bytes=64 << 10))
        one, other = await world.pair()
        began = world.loop.time()
        one.pipe.write(bytes(5_000_000))
        await asyncio.sleep(60)
        assert len(other.heard) == 5_000_000
        assert 0.7 < 5.0 / (other.times[-1] - began) <= 1.0

    simulate(main)


@pytest.mark.parametrize(("buffers", "rate"), [(None, 4 << 20), (32 << 20, 12_500_000)])
def test_a_long_fat_path_is_filled_only_once_the_buffers_hold_it(buffers: int | None, rate: int) -> None:
    """100 Mbit/s and a round trip of a second: 12.5 MB in flight, as with 1 Gbit/s and 100 ms."""

    async def main() -> None:
        line = 12_500_000.0
        raised = Card(line, send_buffer_bytes=buffers or 0, receive_window_bytes=buffers or 0)
        world = World(Path(delay_s=0.5), raised if buffers else Card(line))
        accepted = Ear()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: accepted)
        one = await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        one.pipe.write(bytes(90_000_000))
        await asyncio.sleep(13)
        before = len(accepted.heard)
        await asyncio.sleep(2)
        assert (len(accepted.heard) - before) / 2 == pytest.approx(rate, rel=0.15)

    simulate(main)


def test_loss_costs_what_the_formula_of_mathis_says() -> None:
    async def main() -> None:
        world = World(Path(delay_s=0.05, loss=0.01))
        one, other = await world.pair()
        one.pipe.write(bytes(20_000_000))
        await asyncio.sleep(60)
        rate = len(other.heard) / 60
        mathis = 1460 / 0.1 * 1.22 / 0.01**0.5
        assert mathis / 1.5 < rate < mathis * 1.5

    simulate(main)


def test_a_lost_tail_arrives_after_a_time_out() -> None:
    async def main() -> None:
        world = World()
        one, other = await world.pair()
        one.pipe.write(b"warm")
        await asyncio.sleep(1)
        world.fabric.set_path("a", "b", Path(delay_s=0.05, loss=0.5))
        times = []
        for _ in range(60):
            began = world.loop.time()
            one.pipe.write(b"x")
            await asyncio.sleep(100)
            times.append(other.times[-1] - began)
        late = sorted(times)
        assert late[0] == pytest.approx(0.05)
        assert 15 < sum(time > 0.3 for time in times) < 45
        assert late[-1] > 0.9

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


def test_an_exception_out_of_a_protocol_ends_its_connection_and_fails_the_run() -> None:
    class Broken(Ear):
        def buffer_updated(self, nbytes: int) -> None:
            raise ValueError("bad bytes")

    async def main() -> None:
        world = World()
        broken = Broken()
        await world.fabric.transport("b").listen(tcp_address(ADDRESSES["b"], 4001), lambda: broken)
        one = await world.fabric.transport("a").dial(tcp_address(ADDRESSES["b"], 4001), Ear)
        assert isinstance(one, Ear)
        one.pipe.write(b"x")
        await asyncio.sleep(1)
        assert isinstance(broken.ended[0], ValueError)
        assert one.ended == [None]

    with pytest.raises(UntakenError, match="bad bytes"):
        simulate(main)


def test_the_same_seed_gives_the_same_trace() -> None:
    def once() -> str:
        async def main() -> str:
            world = World(Path(delay_s=0.02, jitter_s=0.01, loss=0.02), Card(uplink_bytes_per_s=500_000))
            one, other = await world.pair()
            back, _ = await world.pair("c", "a")
            for ear in (one, other, back):
                ear.pipe.write(bytes(300_000))
            await asyncio.sleep(60)
            return world.trace.hexdigest()

        return run(main())

    assert once() == once()


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


def test_a_sender_before_a_shut_window_asks_and_gives_up_on_a_host_without_power() -> None:
    async def main() -> None:
        world = World(card=Card(receive_window_bytes=10_000))
        one, other = await world.pair()
        other.pipe.pause_reading()
        one.pipe.write(bytes(500_000))
        await asyncio.sleep(5000)
        assert one.ended == []
        number = world.fabric.partition(["a"], ["b"])
        other.pipe.resume_reading()  # the news of it is lost
        await asyncio.sleep(60)
        world.fabric.heal(number)
        await asyncio.sleep(300)
        assert len(other.heard) == 500_000
        other.pipe.pause_reading()
        one.pipe.write(bytes(500_000))
        await asyncio.sleep(100)
        world.fabric.power_off("b")
        await asyncio.sleep(4000)
        assert isinstance(one.ended[0], TimeoutError)

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
