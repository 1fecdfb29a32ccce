"""A key that everybody reads at once: newcomers ask its few holders, on homes' uplinks, for all of it.

What a reader knows after each read is compared with what was published; measured is how long it took until that was all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from netsim.metrics import Metrics
from netsim.workloads.dht import COMMON_METRICS, DhtScene, Published, peer_of
from netsim.world import HostDied, Machine, World

KEY = b"busy"
PAUSE_S = 1.0
"""Between two reads."""
PADDING_CHARS = 20
"""Of one random number, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class ReadersSettings:
    """Everybody joins, some publish under one key, and everybody reads it.

    Attributes:
        publishers: hosts that each publish a record.
        value_bytes: about how long a record's value is; random, so that nothing makes it shorter on its way.
        ttl_s: of each record.
        settle_s: between the last join and the first record, and again before the first read.
        within_s: all begin to read within so long, at moments drawn by the seed.
        reads_max: of each, one a second, until it knows all.
    """

    publishers: int = 120
    value_bytes: int = 600
    ttl_s: float = 120.0
    settle_s: float = 10.0
    within_s: float = 1.0
    reads_max: int = 5


class Readers(DhtScene[ReadersSettings]):
    """See `ReadersSettings`."""

    SETTINGS: ClassVar[type[ReadersSettings]] = ReadersSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "records": "records that everybody is to find",
        "read_s": "seconds a reader's first read took",
        "read.share": "of the records, those that a reader knows after its first read",
        "whole_s": "seconds from a reader's first question until it knew all records",
        "whole": "readers that came to know all records",
        "put_off": "answers that holders put off, having as much under way as leaves in a moment",
    }
    COUNTED: ClassVar[tuple[str, ...]] = ("records", "whole")

    def __init__(self, world: World, settings: ReadersSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        for name in ("read_s", "read.share", "whole_s"):
            metrics.expect(name)

    async def _scene(self) -> None:
        field, settings = self._field, self._settings
        await self._begin(settings.settle_s)
        publishers = field.draws.sample(field.joined(), settings.publishers)
        made = await field.at_once([partial(self._publish, machine) for machine in publishers])
        records = [record for record in made if record is not None]
        self._metrics.put("records", len(records))
        await asyncio.sleep(settings.settle_s)
        readers = field.joined()
        await field.at_once([partial(self._read, machine, records) for machine in readers], len(readers))
        self._metrics.put("put_off", sum(peer_of(machine).dht.statistics().put_off for machine in field.joined()))

    async def _publish(self, machine: Machine) -> Published | None:
        numbers = self._settings.value_bytes // PADDING_CHARS
        padding = "".join(f" {self._field.draws.getrandbits(76):019x}" for _ in range(numbers))
        return await self._field.publish(machine, KEY, self._settings.ttl_s, padding)

    async def _read(self, machine: Machine, wanted: Sequence[Published]) -> None:
        await asyncio.sleep(self._field.draws.uniform(0.0, self._settings.within_s))
        followed, began_s = peer_of(machine).dht.follow(KEY), self._world.now_s
        for number in range(self._settings.reads_max):
            try:
                found = await self._world.on(machine, followed.read())
            except HostDied:
                return
            wrong = sum(not self._field.is_published(record) for record in found)
            self._metrics.count("wrong", wrong, of=machine.name if wrong else "")
            values = {record.value: None for record in found}
            known = sum(record.value in values for record in wanted)
            if number == 0:
                self._metrics.observe("read_s", self._world.now_s - began_s, of=machine.name)
                self._metrics.observe("read.share", known / max(1, len(wanted)), of=machine.name)
            if known == len(wanted):
                self._metrics.observe("whole_s", self._world.now_s - began_s, of=machine.name)
                self._metrics.count("whole")
                return
            await asyncio.sleep(PAUSE_S)


WORKLOADS = {"readers": Readers}
