"""Between two ends: order, shares of cards and paths, losses, time-outs, shut windows; and the same for the same seed."""

from __future__ import annotations

import asyncio

import pytest

from netsim.fabric import Card, Path
from netsim.loop import UntakenError, run
from overlay.multiaddr import tcp_address
from tests.netsim.three_hosts import ADDRESSES, Ear, World, simulate


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
        world.addresses["d"] = "20.3.0.1"
        world.fabric.add_host("d", world.addresses["d"], Card(downlink_bytes_per_s=1_000_000))
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
