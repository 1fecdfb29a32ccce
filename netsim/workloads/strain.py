"""Streams under strain: readers that are slow, thousands that are opened and reset, writes that cross before anybody reads.

As in `streams`, production's connections on `bare` peers. What is measured is what must not happen: memory that grows, lanes that
stay, others that wait.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from netsim.metrics import Metrics
from netsim.peers.bare import CROSS, DECODE, DRIP, ECHO, PIECE_BYTES, BarePeer, window
from netsim.workloads import Scene
from netsim.workloads.streams import one_of, ready
from netsim.world import World
from overlay.connection import Connection
from overlay.errors import PeerdError, ProtocolRefused, StreamReset
from overlay.host import Host
from overlay.stream import Stream
from overlay.yamux.session import INITIAL_WINDOW

UNKNOWN = "/netsim/nobody-speaks-this/1"


def streams_of(host: Host) -> list[Stream]:
    """The live streams of all of a host's connections."""
    lanes = [lane for connection in host.connections() for lane in connection.session.live_lanes()]
    return [lane.owner for lane in lanes if isinstance(lane.owner, Stream)]


# --- slow readers ---


@dataclass(frozen=True, slots=True)
class SlowSettings:
    """``writers`` streams that write without end to a host that reads a little, and decode windows beside them."""

    source: str = "driver"
    to: str = "hop"
    writers: int = 8
    for_s: float = 30.0
    window_bytes: int = 16 << 10
    every_s: float = 0.1


class Slow(Scene[SlowSettings]):
    """What slow readers hold of everybody's memory, and whether others notice."""

    SETTINGS: ClassVar[type[SlowSettings]] = SlowSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "unread_bytes": "received and not read yet at the slow reader's host, all streams together; the most there was",
        "unsent_bytes": "written and not sent yet at the sender, all streams together; the most there was",
        "read_bytes": "what the slow readers read",
        "beside_s": "seconds of a decode window beyond the path's delay, on the same connection",
        "lost": "decode windows that never came",
        "unread": "bytes over time",
    }

    def __init__(self, world: World, settings: SlowSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._most = {"unread_bytes": 0, "unsent_bytes": 0}
        self._sent = self._came = 0

    async def run(self) -> None:
        world, told = self._world, self._settings
        source, target = one_of(world, told.source), one_of(world, told.to)
        sender, reader = await ready(world, (source, target))
        delay_s = world.choose_path(source.name, target.name).delay_s
        reader.on_window = lambda protocol, length, seconds: self._took(seconds - delay_s, target.name)
        works = [world.on(source, self._write(sender, reader)) for _ in range(told.writers)]
        works += [world.on(source, self._decode(sender, reader)), self._look(sender, reader)]
        tasks = [asyncio.get_running_loop().create_task(work, name=f"strain {at}") for at, work in enumerate(works)]
        await asyncio.sleep(told.for_s)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(1.0)
        for name, value in self._most.items():
            self._metrics.put(name, value)
        self._metrics.put("read_bytes", reader.received_bytes)
        self._metrics.put("lost", self._sent - self._came)

    async def _write(self, sender: BarePeer, reader: BarePeer) -> None:
        stream = await sender.open(reader, DRIP)
        while True:
            await stream.write(bytes(PIECE_BYTES))

    async def _decode(self, sender: BarePeer, reader: BarePeer) -> None:
        stream = await sender.open(reader, DECODE)
        while True:
            stream.write_nowait(window(self._settings.window_bytes, asyncio.get_running_loop().time()))
            self._sent += 1
            await asyncio.sleep(self._settings.every_s)

    async def _look(self, sender: BarePeer, reader: BarePeer) -> None:
        while True:
            unread = sum(stream.unread_bytes for stream in streams_of(reader.overlay))
            unsent = sum(stream.outgoing_bytes for stream in streams_of(sender.overlay))
            for name, value in (("unread_bytes", unread), ("unsent_bytes", unsent)):
                self._most[name] = max(self._most[name], value)
            self._metrics.sample("unread", self._world.now_s, unread)
            await asyncio.sleep(0.1)

    def _took(self, seconds: float, name: str) -> None:
        self._came += 1
        self._metrics.observe("beside_s", seconds, of=name)


# --- opened and reset ---


@dataclass(frozen=True, slots=True)
class ChurnSettings:
    """``streams`` are opened, at most ``at_once``, each ended in a way that the seed draws."""

    source: str = "driver"
    to: str = "hop"
    streams: int = 4000
    at_once: int = 100
    bytes_max: int = 30_000


class Churn(Scene[ChurnSettings]):
    """Thousands of streams that are opened and ended in every way: nothing of them stays."""

    SETTINGS: ClassVar[type[ChurnSettings]] = ChurnSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "opened": "streams",
        "wrong": "streams that ended otherwise than they should have",
        "left.lanes": "lanes on both sides afterwards",
        "left.granted_bytes": "receive window beyond the initial one that is still given away",
        "left.unnegotiated": "inbound streams that are still counted as agreeing on a protocol",
        "left.handlers": "tasks on the answering side beyond those that were there before",
        "left.objects": "stream objects that are still in memory",
    }

    COUNTED = ("opened", "wrong")

    def __init__(self, world: World, settings: ChurnSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._draws = world.random("ends of streams")

    async def run(self) -> None:
        world, told = self._world, self._settings
        source, target = one_of(world, told.source), one_of(world, told.to)
        sender, answerer = await ready(world, (source, target))
        await world.on(source, sender.connect(answerer))
        await asyncio.sleep(5.0)
        tasks_before = len(world.loop.tasks_of(target.name))
        await world.on(source, self._all(sender, answerer))
        await asyncio.sleep(5.0)
        connections = [*sender.overlay.connections(), *answerer.overlay.connections()]
        self._metrics.put("left.lanes", sum(len(found.session.lanes) for found in connections))
        self._metrics.put("left.granted_bytes", sum(map(_granted, connections)))
        self._metrics.put("left.unnegotiated", sum(found.unnegotiated for found in connections))
        self._metrics.put("left.handlers", len(world.loop.tasks_of(target.name)) - tasks_before)
        gc.collect()
        owners = (sender.overlay, answerer.overlay)
        # Not isinstance: it asks proxies of other libraries for their class, and those of dead things raise.
        objects = [found for found in gc.get_objects() if type(found) is Stream]
        self._metrics.put("left.objects", sum(found.connection._owner in owners for found in objects))

    async def _all(self, sender: BarePeer, answerer: BarePeer) -> None:
        turns = asyncio.Semaphore(self._settings.at_once)

        async def turn(how: str, count: int) -> None:
            async with turns:
                await self._one(sender, answerer, how, count)

        async with asyncio.TaskGroup() as tasks:
            for number in range(self._settings.streams):
                how = self._draws.choice(("reset", "write-reset", "echo", "refused", "abandoned", "lazy-reset"))
                tasks.create_task(turn(how, self._draws.randrange(1, self._settings.bytes_max)), name=f"turn {number}")

    async def _one(self, sender: BarePeer, answerer: BarePeer, how: str, count: int) -> None:
        self._metrics.count("opened")
        is_right = True
        try:
            if how == "lazy-reset":  # before the peer could agree
                connection = await sender.overlay.connect(answerer.peer_id, answerer.addresses)
                connection.open_stream(ECHO).reset()
                return
            stream = await sender.open(answerer, UNKNOWN if how == "refused" else ECHO)
            is_right = how != "refused"
            if how != "reset":
                stream.write_nowait(bytes(count))
            if how == "echo":
                await stream.close_write()
                is_right = len(await stream.read_exactly(count)) == count and await stream.read() == b""
            elif how == "abandoned":
                await stream.close()
            else:
                stream.reset()
        except ProtocolRefused:
            is_right = how == "refused"
        except StreamReset:
            is_right = False
        self._metrics.count("wrong", int(not is_right), of="" if is_right else "driver-1")


def _granted(connection: Connection) -> int:
    session = connection.session
    return session._granted_extra + sum(lane.window_size - INITIAL_WINDOW for lane in session.live_lanes())


# --- writes that cross ---


@dataclass(frozen=True, slots=True)
class CrossedSettings:
    """``streams`` on one connection on which both sides write before they read."""

    source: str = "driver"
    to: str = "hop"
    streams: int = 8


class Crossed(Scene[CrossedSettings]):
    """Both sides write before they read, and nobody waits for ever."""

    SETTINGS: ClassVar[type[CrossedSettings]] = CrossedSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        "whole.share": "of the streams whose bytes came whole, both ways",
        "took_s": "seconds until the last was whole",
        "ask_s": "seconds of calls meanwhile on the same connection",
    }

    async def run(self) -> None:
        world, told = self._world, self._settings
        source, target = one_of(world, told.source), one_of(world, told.to)
        one, other = await ready(world, (source, target))
        await world.on(source, one.connect(other))
        began_s = world.now_s
        asking = world.loop.create_task(world.on(source, self._ask(one, other)), name="asking")
        whole = await world.on(source, self._cross(one, other))
        self._metrics.put("took_s", world.now_s - began_s)
        asking.cancel()
        await asyncio.wait((asking,))
        self._metrics.put("whole.share", sum(count > 0 for count in whole) / told.streams)

    async def _cross(self, one: BarePeer, other: BarePeer) -> Sequence[int]:
        streams = [await one.open(other, CROSS) for _ in range(self._settings.streams)]
        return await asyncio.gather(*(one.cross(stream) for stream in streams))

    async def _ask(self, one: BarePeer, other: BarePeer) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                await one.call(other, 100)
            except PeerdError as error:
                self._world.trace.note("driver-1", f"a call failed: {error}")
                continue
            self._metrics.observe("ask_s", loop.time() - began_s)
            await asyncio.sleep(0.1)


WORKLOADS = {"slow": Slow, "churn": Churn, "crossed": Crossed}
