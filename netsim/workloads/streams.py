"""What streams do on real paths: priorities on a thin uplink, fat windows, slow readers, streams that come and go, writes that cross.

Every workload here runs on `bare` peers: production's connections, streams, yamux and Noise, nothing above. Hosts are taken from
the groups that the settings name, in their order. Garbage has a module of its own, and so has who can dial whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from netsim.metrics import Metrics
from netsim.peers.bare import BULK, DECODE, BarePeer, window
from netsim.world import Machine, World
from overlay.stream import Stream

READY_S = 60.0
POLL_S = 0.01
PERIODS = (0.7, 1.3)
"""Of the time from one token to the next, as shares of the usual."""


async def ready(world: World, machines: Sequence[Machine]) -> list[BarePeer]:
    """The bare peers of these machines, once they run. Raises TimeoutError."""
    async with asyncio.timeout(READY_S):
        while not all(machine.is_alive and machine.peer is not None for machine in machines):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        peers = [cast(BarePeer, machine.peer) for machine in machines]
        for peer in peers:
            await peer.is_ready.wait()
        return peers


def one_of(world: World, group: str) -> Machine:
    """The first machine of a group."""
    return world.group(group)[0]


# --- decode beside prefill ---


@dataclass(frozen=True, slots=True)
class BesideSettings:
    """Sessions of small windows, and a big transfer that comes in their midst.

    Attributes:
        to: the group whose first host takes the windows; ``bulk_to``: the one that takes the transfer.
        sessions: decode streams, each with a window about every ``every_s``.
        alone_s: seconds of windows before the transfer begins, and after it has ended.
        is_prompt: the transfer goes over a stream for decoding, as prompts do.
        late_s: the windows begin so long after the transfer, when the way is full of it.
    """

    source: str = "driver"
    to: str = "hop"
    bulk_to: str = "hop"
    sessions: int = 2
    window_bytes: int = 16 << 10
    every_s: float = 0.1
    alone_s: float = 2.0
    is_prompt: bool = False
    late_s: float = 0.0
    bulk_bytes: int = 16 << 20
    bulks: int = 1
    uplink_mbit: float = 20.0


class Beside:
    """Decode windows beside a prefill: how long they take beyond the path, and what is left for the prefill."""

    SETTINGS: ClassVar[type[BesideSettings]] = BesideSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "alone_s": "seconds of a window beyond the path's delay, with nothing beside it",
        "beside_s": "seconds of a window beyond the path's delay, while the transfer runs",
        "lost": "windows that never came",
        "bulk_s": "seconds of the transfer",
        "bulk.share": "of the uplink that the transfer got besides the windows' bytes",
        "window_s": "each window's seconds beyond the path, over time",
    }

    def __init__(self, world: World, settings: BesideSettings, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        self._is_beside = False
        self._came = self._sent = 0
        self._bulk_ended: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._is_over = False

    async def run(self) -> None:
        world, told = self._world, self._settings
        source, target, bulk_target = (one_of(world, name) for name in (told.source, told.to, told.bulk_to))
        sender, taker, bulk_taker = await ready(world, (source, target, bulk_target))
        delay_s = world.choose_path(source.name, target.name).delay_s
        taker.on_window = bulk_taker.on_window = lambda protocol, length, seconds: self._took(
            length, seconds - delay_s, target.name
        )
        async with asyncio.TaskGroup() as tasks:
            for number in range(told.sessions):
                tasks.create_task(world.on(source, self._decode(sender, taker, number)), name=f"decoding {number}")
            await asyncio.sleep(told.alone_s)
            began_s, sent_before = world.now_s, self._sent
            self._is_beside = True
            for _ in range(told.bulks):
                self._bulk_ended = asyncio.get_running_loop().create_future()
                await world.on(source, self._transfer(sender, bulk_taker))
            took_s = world.now_s - began_s
            self._is_beside = False
            beside_bytes = (self._sent - sent_before) * told.window_bytes
            self._metrics.put("bulk_s", took_s)
            rate = told.uplink_mbit * 125_000 - beside_bytes / took_s
            self._metrics.put("bulk.share", told.bulks * told.bulk_bytes / took_s / rate)
            await asyncio.sleep(told.alone_s)
            self._is_over = True
        await asyncio.sleep(told.alone_s)
        self._metrics.put("lost", self._sent - self._came)

    async def _decode(self, sender: BarePeer, taker: BarePeer, number: int) -> None:
        told = self._settings
        stream = await sender.open(taker, DECODE)
        draws = self._world.random(f"windows of {number}")
        await asyncio.sleep(told.every_s * draws.random())
        if told.late_s:
            await asyncio.sleep(told.alone_s + told.late_s)
        while not self._is_over:
            stream.write_nowait(window(told.window_bytes, asyncio.get_running_loop().time()))
            self._sent += 1
            await asyncio.sleep(told.every_s * draws.uniform(*PERIODS))
        await stream.close()

    async def _transfer(self, sender: BarePeer, taker: BarePeer) -> None:
        stream = await sender.open(taker, DECODE if self._settings.is_prompt else BULK)
        stream.write_nowait(window(self._settings.bulk_bytes, asyncio.get_running_loop().time()))
        await self._bulk_ended
        await stream.close()

    def _took(self, length: int, seconds: float, name: str) -> None:
        if length == self._settings.bulk_bytes:
            if not self._bulk_ended.done():
                self._bulk_ended.set_result(seconds)
            return
        self._came += 1
        self._metrics.observe("beside_s" if self._is_beside else "alone_s", seconds, of=name)
        self._metrics.sample("window_s", self._world.now_s, seconds)
        self._world.trace.add("window", name, f"{seconds:.6f}")


# --- a path to fill ---


@dataclass(frozen=True, slots=True)
class FillSettings:
    """``windows`` of ``window_bytes`` one after the other, of which the first ``warm_up`` aren't measured."""

    source: str = "driver"
    to: str = "hop"
    window_bytes: int = 8 << 20
    windows: int = 64
    warm_up: int = 16
    link_mbit: float = 1000.0
    streams: int = 1


class Fill:
    """What share of a long fat path's rate streams get, once windows have grown."""

    SETTINGS: ClassVar[type[FillSettings]] = FillSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "share": "of the link's rate, after the warm-up",
        "warm_up_s": "seconds of the first windows",
        "receive_window": "bytes that one stream may have under way at the end",
        "rate_mbit": "what arrives, over time",
    }

    def __init__(self, world: World, settings: FillSettings, metrics: Metrics) -> None:
        self._world = world
        self._settings = settings
        self._metrics = metrics
        self._arrivals: list[float] = []
        self._whole = asyncio.Event()

    async def run(self) -> None:
        world, told = self._world, self._settings
        source, target = one_of(world, told.source), one_of(world, told.to)
        sender, taker = await ready(world, (source, target))
        taker.on_window = self._took
        began_s = world.now_s
        await world.on(source, self._send(sender, taker))
        ends = self._arrivals
        self._metrics.put("warm_up_s", ends[told.warm_up - 1] - began_s)
        measured = (len(ends) - told.warm_up) * told.window_bytes / (ends[-1] - ends[told.warm_up - 1])
        self._metrics.put("share", measured / (told.link_mbit * 125_000))

    async def _send(self, sender: BarePeer, taker: BarePeer) -> None:
        told = self._settings
        streams = [await sender.open(taker, BULK) for _ in range(told.streams)]
        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(self._fill(stream), name="filling")
        async with asyncio.timeout(60.0):
            await self._whole.wait()
        self._metrics.put("receive_window", max(_lane_window(taker, sender), default=0))
        for stream in streams:
            await stream.close()

    async def _fill(self, stream: Stream) -> None:
        told = self._settings
        for _ in range(told.windows // told.streams):
            await stream.write(window(told.window_bytes, asyncio.get_running_loop().time()))

    def _took(self, protocol: str, length: int, seconds: float) -> None:
        now = self._world.now_s
        if self._arrivals and now > self._arrivals[-1]:
            self._metrics.sample("rate_mbit", now, length / (now - self._arrivals[-1]) / 125_000)
        self._arrivals.append(now)
        if len(self._arrivals) == self._settings.windows:
            self._whole.set()
        self._world.trace.add("window", "", f"{length} {seconds:.6f}")


def _lane_window(taker: BarePeer, sender: BarePeer) -> list[int]:
    connection = taker.overlay.connection(sender.peer_id)
    return [lane.window_size for lane in connection.session.live_lanes()] if connection is not None else []


WORKLOADS = {"beside": Beside, "fill": Fill}
