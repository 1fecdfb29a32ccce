"""The DHT while things go wrong: hosts that come and go, a network in two parts, records that run out or are taken back.

Whoever publishes is known, and until when what it published may be found; `wrong` counts what was found beyond that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from netsim.metrics import Metrics
from netsim.workloads.dht import COMMON_METRICS, DhtScene, Published, is_joined, peer_of
from netsim.world import Machine, World

TTL_SLACK_S = 5.0
"""What is under way when a record's time is over."""
LEFT = ("stop", "kill", "power-off", "freeze", "sleep")
"""The world's words for a host that goes."""


@dataclass(slots=True)
class _Kept:
    """A record, and the run of the process that keeps it published."""

    record: Published
    machine: Machine
    incarnation: int
    since_s: float
    until_s: float = 0.0
    """When its publisher was last seen."""

    @property
    def is_kept(self) -> bool:
        return self.machine.is_alive and self.machine.incarnation == self.incarnation


@dataclass(frozen=True, slots=True)
class ChurnSettings:
    """Records are kept while hosts come and go; whose publisher left is published by another host.

    Attributes:
        keys: how many are kept.
        ttl_s: of each record.
        looks_per_s: of hosts drawn by the seed.
        warm_s: between the first records and the first look.
    """

    keys: int = 50
    ttl_s: float = 120.0
    looks_per_s: float = 1.0
    warm_s: float = 20.0


class Churn(DhtScene[ChurnSettings]):
    """See `ChurnSettings`. Goes on until the time is over."""

    SETTINGS: ClassVar[type[ChurnSettings]] = ChurnSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "alive": "hosts that run, over time",
        "leaves": "times that a host left, in any way",
    }

    def __init__(self, world: World, settings: ChurnSettings, metrics: Metrics) -> None:
        super().__init__(world, settings, metrics)
        self._kept: dict[bytes, _Kept] = {}
        self._left: list[_Kept] = []

    async def _scene(self) -> None:
        settings, field = self._settings, self._field
        await field.wait_joined()
        async with asyncio.TaskGroup() as tasks:
            for number in range(settings.keys):
                tasks.create_task(self._keep(f"kept {number}".encode()), name=f"keep {number}")
            await asyncio.sleep(settings.warm_s)
            field.settled()
            while True:
                await asyncio.sleep(field.draws.expovariate(settings.looks_per_s))
                tasks.create_task(self._look(), name="look")
                self._metrics.sample("alive", self._world.now_s, len(self._world.alive()))
                self._metrics.put("leaves", sum(kind in LEFT for _, kind in self._world.marks))
                field.count_calls()

    async def _keep(self, key: bytes) -> None:
        while True:
            machine = self._field.draws.choice(self._field.joined())
            record = await self._field.publish(machine, key, self._settings.ttl_s)
            if record is None:
                continue
            now_s = self._world.now_s
            kept = self._kept[key] = _Kept(record, machine, machine.incarnation, now_s, now_s)
            self._left.append(kept)
            while kept.is_kept:
                kept.until_s = self._world.now_s
                await asyncio.sleep(1.0)
            del self._kept[key]

    async def _look(self) -> None:
        now_s, draws = self._world.now_s, self._field.draws
        there = [kept for kept in self._kept.values() if kept.is_kept]
        lookers = self._field.joined()
        if not there or not lookers:
            return
        kept, looker = draws.choice(there), draws.choice(lookers)
        over = now_s - self._settings.ttl_s - TTL_SLACK_S
        gone = [old.record.value for old in self._left if old.record.key == kept.record.key and old.until_s < over]
        await self._field.look(looker, [kept.record], gone=gone)


@dataclass(frozen=True, slots=True)
class PartitionSettings:
    """The network breaks in two; both parts publish, and everybody looks for so much that it forgets whom it can't reach; it heals.

    Attributes:
        keys: published before, in each part during, and looked for by ``lookers`` hosts.
        share: of the hosts, on the far side; ``boot`` hosts stay on the near one.
        for_s: how long it lasts.
        looks: of each host while it lasts, for keys that nobody published.
        healed_s: the time to find together again.
    """

    keys: int = 10
    share: float = 0.5
    for_s: float = 240.0
    looks: int = 6
    healed_s: float = 240.0
    lookers: int = 10
    settle_s: float = 20.0
    ttl_s: float = 600.0


class Partition(DhtScene[PartitionSettings]):
    """See `PartitionSettings`."""

    SETTINGS: ClassVar[type[PartitionSettings]] = PartitionSettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "before.share": "of the lookups before, those that found all",
        "within.share": "of the lookups in a part for what that part published",
        "healed.share": "of the lookups afterwards for everything",
        "across.within": "contacts on the other side that hosts still have just before the network heals, all together",
        "across.healed": "contacts that a host has on the other side, long after",
    }

    async def _scene(self) -> None:
        settings, field = self._settings, self._field
        everybody = await self._begin(settings.settle_s)
        homes = [machine for machine in everybody if machine.group != "boot"]
        far = field.draws.sample(homes, round(settings.share * len(everybody)))
        names = {machine.name: None for machine in far}
        near = [machine for machine in everybody if machine.name not in names]
        before = await self._publish(everybody, "before")
        await self._look("before.share", everybody, before)
        number = self._world.partition(list(names), [machine.name for machine in near])
        await asyncio.sleep(settings.for_s / 2)
        on_far, on_near = await self._publish(far, "far"), await self._publish(near, "near")
        await self._wear_out(everybody)
        await asyncio.sleep(settings.for_s / 2)
        await self._look("within.share", far, on_far)
        await self._look("within.share", near, on_near)
        across = sum(_known_of(one, near) for one in far) + sum(_known_of(one, far) for one in near)
        self._metrics.put("across.within", across)
        self._world.heal(number)
        await asyncio.sleep(settings.healed_s)
        for machine in everybody:
            others = near if machine.name in names else far
            self._metrics.observe("across.healed", _known_of(machine, others), of=machine.name)
        field.settled()
        await self._look("healed.share", everybody, [*before, *on_far, *on_near])

    async def _wear_out(self, machines: Sequence[Machine]) -> None:
        """Let everybody ask whomever it knows near this place and that, until those on the other side are known no more."""
        works = []
        for machine in machines:
            for number in range(self._settings.looks):
                works.append(partial(self._ask_for, machine, f"{number} of nobody".encode()))
        await self._field.at_once(works)

    async def _ask_for(self, machine: Machine, key: bytes) -> None:
        await self._world.on(machine, peer_of(machine).find(key))

    async def _publish(self, machines: Sequence[Machine], when: str) -> list[Published]:
        keys = [f"{when} {number}".encode() for number in range(self._settings.keys)]
        ttl_s = self._settings.ttl_s
        works = [partial(self._field.publish, self._field.draws.choice(machines), key, ttl_s) for key in keys]
        return [record for record in await self._field.at_once(works) if record is not None]

    async def _look(self, metric: str, machines: Sequence[Machine], records: Sequence[Published]) -> None:
        count = min(self._settings.lookers, len(machines))
        works = [
            partial(self._field.look, machine, [record])
            for record in records
            for machine in self._field.draws.sample(machines, count)
        ]
        found = await self._field.at_once(works)
        before = self._metrics.numbers().get(metric)
        share = sum(found) / len(found)
        self._metrics.put(metric, share if before is None else min(share, before))


def _known_of(machine: Machine, others: Sequence[Machine]) -> int:
    """How many of the others it has as contacts."""
    known = {peer: None for peer, _ in peer_of(machine).dht.known_peers()}
    return sum(peer_of(other).identity.peer_id in known for other in others)


@dataclass(frozen=True, slots=True)
class ExpirySettings:
    """Some publishers are killed, some take back what they published, some keep it.

    Attributes:
        keys: of each kind.
        ttl_s: of each record.
        lookers: hosts drawn for each look.
    """

    keys: int = 10
    ttl_s: float = 60.0
    lookers: int = 10
    settle_s: float = 20.0


class Expiry(DhtScene[ExpirySettings]):
    """See `ExpirySettings`."""

    SETTINGS: ClassVar[type[ExpirySettings]] = ExpirySettings
    METRICS: ClassVar[Mapping[str, str]] = {
        **COMMON_METRICS,
        "withdraw_s": "seconds until a record was taken back everywhere",
        "stored.left": "records and tombstones that hosts still hold when all that were published ran out",
    }

    async def _scene(self) -> None:
        settings, field = self._settings, self._field
        everybody = await self._begin(settings.settle_s)
        field.settled()
        publishers = field.draws.sample([m for m in everybody if m.group != "boot"], 3 * settings.keys)
        made: list[tuple[Machine, Published]] = []
        for number, machine in enumerate(publishers):
            record = await field.publish(machine, f"key {number % settings.keys}".encode(), settings.ttl_s)
            if record is not None:
                made.append((machine, record))
        killed, withdrawn, kept = (made[start::3] for start in range(3))
        await self._look([record for _, record in made], gone=())
        for machine, record in withdrawn:
            began_s = self._world.now_s
            await self._world.on(machine, peer_of(machine).dht.withdraw(record.key, record.subkey))
            self._metrics.observe("withdraw_s", self._world.now_s - began_s, of=machine.name)
        for machine, _ in killed:
            self._world.kill(machine)
        await self._look([record for _, record in kept], gone=[record for _, record in withdrawn])
        await asyncio.sleep(settings.ttl_s + TTL_SLACK_S)
        gone = [record for _, record in [*withdrawn, *killed]]
        await self._look([record for _, record in kept], gone=gone)
        await asyncio.sleep(2 * settings.ttl_s)
        await self._look([record for _, record in kept], gone=gone)
        await self._end(kept)

    async def _end(self, kept: Sequence[tuple[Machine, Published]]) -> None:
        """Nobody publishes any more: nothing may be left."""
        for machine, _ in kept:
            self._world.kill(machine)
        await asyncio.sleep(self._settings.ttl_s + TTL_SLACK_S)
        self._metrics.put("stored.left", 0)
        for machine in self._world.alive():
            dht = peer_of(machine).dht
            dht.held(kept[0][1].key)  # a store forgets what is over when it is asked
            left = dht.statistics().stored
            self._metrics.count("stored.left", left, of=machine.name if left else "")

    async def _look(self, wanted: Sequence[Published], *, gone: Sequence[Published]) -> None:
        field = self._field
        keys = list(dict.fromkeys(record.key for record in wanted))
        works = []
        for key in keys:
            here = [record for record in wanted if record.key == key]
            over = [record.value for record in gone if record.key == key]
            lookers = [machine for machine in field.joined() if is_joined(machine)]
            for machine in field.draws.sample(lookers, min(self._settings.lookers, len(lookers))):
                works.append(partial(field.look, machine, here, gone=over))
        await field.at_once(works)


WORKLOADS = {"churn": Churn, "partition": Partition, "expiry": Expiry}
