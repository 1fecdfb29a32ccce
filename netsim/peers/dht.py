"""A host and a DHT node on it, joining as a daemon does: by bootstrap hosts, and by those it knew when it starts again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from netsim.null_channel import null_channel
from netsim.sim_host import LISTEN_PORT, SimHost
from overlay.dht.lookup import LookupReport
from overlay.dht.node import Dht, DhtConfig, Meeting
from overlay.dht.records import Record
from overlay.host import Host, secure_with_noise
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr, tcp_address
from peerd.node import JOIN_RETRY_MAX_S, JOIN_RETRY_MIN_S, SAVE_PEERS_S
from peerd.store import load_known_peers, save_known_peers

SAVED_ADDRESSES = 2
SAVED_AT_MOST = 32


@dataclass(frozen=True, slots=True)
class DhtSettings:
    """What it is told.

    Attributes:
        join: the group of hosts that it is told of; of its own group, the others.
        server: whether it answers others; one that nobody can dial doesn't.
    """

    join: str = "boot"
    server: bool = True


class DhtPeer:
    """`netsim.peers.Peer`. A workload asks ``dht`` and ``overlay`` in this host's context."""

    SETTINGS: ClassVar[type[DhtSettings]] = DhtSettings

    def __init__(self, host: SimHost, settings: DhtSettings) -> None:
        self._host = host
        self._settings = settings
        self._stopping = asyncio.Event()
        self.joined = asyncio.Event()
        self.join_s = 0.0
        """How long joining took, once it has."""
        self.identity = Identity.load_or_create(host.storage, host.ports.randomness)
        self.overlay = Host(
            self.identity, host.ports, secure=secure_with_noise if host.world.is_noise else null_channel
        )
        self.dht = Dht(self.overlay, host.ports, DhtConfig(server=settings.server))
        self.lookup: LookupReport | None = None
        """What the last `find` took."""

    async def run(self) -> None:
        async with self.overlay as overlay:
            await overlay.listen(self._host.listen_address)
            async with self.dht, asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._join_and_remember(), name="joining")
                await self._stopping.wait()
                work.cancel()

    def request_stop(self) -> None:
        self._stopping.set()

    async def _join_and_remember(self) -> None:
        clock = self._host.ports.clock
        began, delay_s = clock.now(), JOIN_RETRY_MIN_S
        meetings = self._meetings()
        while meetings and not await self.dht.bootstrap(meetings):
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, JOIN_RETRY_MAX_S)
        self.join_s = clock.now() - began
        self.joined.set()
        while True:
            self._save()
            await asyncio.sleep(SAVE_PEERS_S)

    def _meetings(self) -> list[Meeting]:
        saved = [Multiaddr.parse(text) for text in load_known_peers(self._host.storage)[:SAVED_AT_MOST]]
        named = [(PeerId.from_text(text), (found,)) for found in saved if (text := found.get("p2p")) is not None]
        told = [machine.address for machine in self._host.world.group(self._settings.join)]
        others = [address for address in told if address != self._host.address]
        return [*named, *((None, (tcp_address(address, LISTEN_PORT),)) for address in others)]

    def _save(self) -> None:
        known = self.dht.known_peers()[-SAVED_AT_MOST:]
        texts = [
            str(address.with_peer(str(peer))) for peer, addresses in known for address in addresses[:SAVED_ADDRESSES]
        ]
        if texts:
            save_known_peers(self._host.storage, texts)

    # --- what a workload asks; run it in the host's context ---

    async def find(self, key: bytes) -> tuple[Record, ...]:
        """`Dht.get`, with `lookup` telling what it took."""
        self.dht.on_lookup = self._looked
        return await self.dht.get(key)

    def _looked(self, report: LookupReport) -> None:
        self.lookup = report


PEER = DhtPeer
