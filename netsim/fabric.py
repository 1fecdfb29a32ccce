"""The simulated internet: machines with addresses behind boxes, paths between them, partitions, deaths.

Owns who can reach whom, and by what path; `netsim.handshake` makes the connections, `netsim.wire` carries them. Implements
`overlay.ports.Transport` for each machine. Must not know peers, nor what they say. docs/netsim.md, section 3.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Protocol, cast

from netsim import nat
from netsim.connection import Endpoint, FabricConnection
from netsim.flow import Card, Path
from netsim.handshake import Dial, FabricListener, Handshakes
from netsim.loop import VirtualLoop
from netsim.nat import NatBox
from netsim.wire import Kernel, Line, Trace, Wire
from overlay.errors import DialError
from overlay.multiaddr import Multiaddr, tcp_address
from overlay.ports import ProtocolFactory
from overlay.transport.tcp import ListenError

__all__ = ["Card", "Dial", "Fabric", "FabricListener", "FabricTransport", "Path"]

EPHEMERAL_PORTS = (49152, 65535)
LOOPBACK = Path(delay_s=0.00002)


class Random(Protocol):
    """What the fabric needs of a seeded generator: one key, once."""

    def getrandbits(self, k: int) -> int: ...


class FabricTransport:
    """`overlay.ports.Transport` of one incarnation of a machine's process."""

    def __init__(self, fabric: Fabric, kernel: Kernel) -> None:
        self._fabric = fabric
        self._kernel = kernel
        self._incarnation = kernel.incarnation

    def can_dial(self, address: Multiaddr) -> bool:
        return address.is_tcp

    @property
    def _is_dead(self) -> bool:
        return self._kernel.incarnation != self._incarnation or not self._kernel.is_on

    async def dial(
        self, address: Multiaddr, factory: ProtocolFactory, local_port: int | None = None
    ) -> asyncio.BufferedProtocol:
        """Connect, one round trip; raises DialError. Cancel-safe. ``local_port`` may be a listener's, as hole punching needs it."""
        host, port = address.host, address.port
        if host is None or port is None:
            raise DialError(f"{address} is no TCP address.")
        if self._is_dead:
            raise DialError("This process is dead.")
        try:
            return await self._fabric.handshakes.dial(self._kernel, (host, port), factory, local_port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise DialError(f"Can't reach {address} ({reason}); is the peer running?") from error

    async def listen(self, address: Multiaddr, factory: ProtocolFactory) -> FabricListener:
        """Listen on the machine's own address; port 0 takes a free one. Raises ListenError."""
        kernel, host, port = self._kernel, address.host, address.port
        if self._is_dead or host is None or port is None:
            raise ListenError(f"Can't listen on {address}.")
        if host not in ("0.0.0.0", "::", "127.0.0.1", kernel.address):
            raise ListenError(f"Can't listen on {address} (Cannot assign requested address): check --listen.")
        if port in kernel.listeners:
            raise ListenError(f"Can't listen on {address} (Address already in use): give another port with --listen.")
        port = port or self._fabric.free_port(kernel)
        context = self._fabric.loop.context_of(kernel.name)
        listener = FabricListener(kernel, context, tcp_address(kernel.address, port), port, factory)
        kernel.listeners[port] = listener
        return listener


class Fabric:
    """See the module. Made inside a running `VirtualLoop`; ``random`` gives the key of every draw of jitter and loss."""

    def __init__(self, trace: Trace, random: Random, default: Path | None = None) -> None:
        self.loop = cast(VirtualLoop, asyncio.get_running_loop())
        self.trace = trace
        self.wire = Wire(self.loop, trace)
        self.handshakes = Handshakes(self)
        self._key = random.getrandbits(64).to_bytes(8, "big")
        usual = default or Path()
        self._choose: Callable[[str, str], Path] = lambda source, target: usual
        self._paths: dict[tuple[str, str], Path] = {}
        self._routers: dict[tuple[str, str], Line] = {}
        self._kernels: dict[str, Kernel] = {}
        self._public: dict[str, list[Kernel]] = {}
        self._private: dict[tuple[NatBox, str], Kernel] = {}
        self._partitions: dict[int, tuple[frozenset[str], frozenset[str], bool]] = {}
        self._next_partition = 1
        self._cuts: dict[tuple[str, str], int] = {}

    @property
    def events(self) -> int:
        """Arrivals, turns of cards, time-outs, dials."""
        return self.wire.events

    # --- machines ---

    def add_host(self, name: str, address: str, card: Card | None = None, nat: Sequence[NatBox] = ()) -> None:
        """A machine with its own ``address``, behind ``nat`` (innermost box first)."""
        if name in self._kernels:
            raise ValueError(f"there is a host {name!r} already")
        self._kernels[name] = kernel = Kernel(name, address, card or Card(), nat)
        self._public.setdefault(_public_address(kernel), []).append(kernel)
        if kernel.nat:
            self._private[kernel.nat[0], address] = kernel

    def transport(self, name: str) -> FabricTransport:
        """The `overlay.ports.Transport` of the process that runs there now."""
        return FabricTransport(self, self._kernels[name])

    def process_died(self, name: str) -> None:
        """kill -9: the kernel sends what it was given and closes; unread bytes make that a reset. Nothing listens any more."""
        kernel = self._kernels[name]
        self._forget_process(kernel)
        for end in list(kernel.ends.values()):
            end.detach()
            self.wire.closed_by_application(end, None)

    def power_off(self, name: str) -> None:
        """Nothing is sent at all: the others are left half-open."""
        kernel = self._kernels[name]
        self._forget_process(kernel)
        kernel.switch(is_on=False)
        for end in list(kernel.ends.values()):
            end.detach()
            end.unplugged()
        kernel.ends.clear()

    def power_on(self, name: str) -> None:
        """The address answers again: segments of old connections with a reset."""
        self._kernels[name].switch(is_on=True)

    def sleep(self, name: str) -> None:
        """The lid is closed: its kernel stands still too, and nothing of it is lost. Freeze the process as well."""
        self._kernels[name].switch(is_asleep=True)

    def wake(self, name: str) -> None:
        """Its kernel goes on with what it had."""
        kernel = self._kernels[name]
        kernel.switch(is_asleep=False)
        for end in list(kernel.ends.values()):
            if end.flow.has_more:
                self.wire.send(end)

    def _forget_process(self, kernel: Kernel) -> None:
        kernel.incarnation += 1
        kernel.listeners.clear()
        kernel.dials.clear()

    def free_port(self, kernel: Kernel) -> int:
        """The next ephemeral port that nobody listens on; they come round after 16,384."""
        low, high = EPHEMERAL_PORTS
        for _ in range(high - low + 1):
            port = kernel.next_port
            kernel.next_port = low if port >= high else port + 1
            if port not in kernel.listeners:
                return port
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    # --- paths ---

    def set_path(self, source: str, target: str, path: Path) -> None:
        """From now on, for live connections too; what is under way keeps its time."""
        self._paths[source, target] = path
        self._routers.pop((source, target), None)
        for end in self._ends_between(source, target):
            self.lay(end)

    def set_default(self, choose: Callable[[str, str], Path]) -> None:
        """Paths as a pure function of (source, target); asked when a connection begins."""
        self._choose = choose

    def partition(self, sources: Collection[str], targets: Collection[str], *, both_ways: bool = True) -> int:
        """Segments from sources to targets are swallowed, those under way too; gives the number to heal it by."""
        number = self._next_partition
        self._next_partition += 1
        self._partitions[number] = (frozenset(sources), frozenset(targets), both_ways)
        self._lay_all(number)
        return number

    def heal(self, partition: int) -> None:
        """What was swallowed is sent again when its sender's time-out next passes."""
        if partition in self._partitions:
            cut = self._partitions.pop(partition)
            self._lay_all(partition, cut)

    def reset(self, one: str, other: str) -> None:
        """Every connection between two machines, now."""
        for end in self._ends_between(one, other):
            self.loop.post_at(self.loop.time(), self.wire.reset, end)

    def cut_after(self, source: str, target: str, count: int) -> None:
        """Reset each connection, live or to come, once so many bytes arrived in this direction."""
        self._cuts[source, target] = count
        for end in self._ends_between(source, target):
            end.cut_after = count

    def reboot_boxes(self, name: str) -> None:
        """The boxes in front of a machine were switched off and on: they swallow what was open through them."""
        kernel = self._kernels[name]
        for box in kernel.nat:
            box.reset()
        for end in kernel.ends.values():
            end.nat_at = end.other.nat_at = 0.0

    def connection_count(self, name: str) -> int:
        """Connections that a machine's kernel has, those that are closing among them."""
        return len(self._kernels[name].ends)

    def _ends_between(self, source: str, target: str) -> list[FabricConnection]:
        return [end for end in self._kernels[source].ends.values() if end.other.kernel.name == target]

    def _lay_all(self, number: int, cut: tuple[frozenset[str], frozenset[str], bool] | None = None) -> None:
        """Look again at the connections that a partition, just made or healed, concerns."""
        sources, targets, _ = cut or self._partitions[number]
        for kernel in self._kernels.values():
            if kernel.name in sources or kernel.name in targets:
                for end in kernel.ends.values():
                    self.lay(end)

    def lay(self, end: FabricConnection) -> None:
        """The path of one direction of a connection, as things are."""
        source, target = end.kernel.name, end.other.kernel.name
        end.path = path = self.path(source, target)
        end.is_cut = end.is_forgotten or self.is_cut(source, target, path)
        end.cut_after = self._cuts.get((source, target))
        end.router = self._router(source, target, path)
        is_simple = not (path.jitter_s or path.loss or path.bytes_per_s)
        end.is_plain = is_simple and not (end.kernel.nat or end.other.kernel.nat)

    def path(self, source: str, target: str) -> Path:
        """What was set for the two, else what the default says."""
        if source == target:
            return LOOPBACK
        return self._paths.get((source, target)) or self._choose(source, target)

    def _router(self, source: str, target: str, path: Path) -> Line | None:
        if not path.bytes_per_s:
            return None
        found = self._routers.get((source, target))
        if found is None:
            found = self._routers[source, target] = Line(path.bytes_per_s, path.queue_bytes)
        return found

    def is_cut(self, source: str, target: str, path: Path) -> bool:
        """Whether a black hole or a partition swallows what goes this way."""
        if path.is_black_hole:
            return True
        for sources, targets, both_ways in self._partitions.values():
            if (source in sources and target in targets) or (both_ways and source in targets and target in sources):
                return source != target
        return False

    def key_of(self, source: Kernel, target: Kernel, purpose: str) -> int:
        """Whose draws of chance these are: of one direction of the source's latest connection."""
        text = f"{source.name} {source.opened} {target.name} {purpose}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8, key=self._key).digest(), "big")

    def candidates(self, kernel: Kernel, target: Endpoint) -> list[Kernel]:
        """Who an address may stand for, seen from a machine: itself, a neighbour behind the same box, or the internet's."""
        if target[0] in (kernel.address, "127.0.0.1"):
            return [kernel]
        if kernel.nat:
            near = self._private.get((kernel.nat[0], target[0]))
            if near is not None:
                return [near]
        return self._public.get(target[0], [])


def _public_address(kernel: Kernel) -> str:
    return nat.public_address(kernel.address, kernel.nat)
