"""The node's end of the overlay: listens, dials, keeps one connection per pair of peers, hands streams to handlers.

Owns the task group of everything below it, the address book and the limits on handshakes. A handler's exception resets its
stream, is logged, and goes no further (this is one of the two supervision points). Knows nothing of DHT, RPC or models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from overlay import limits
from overlay.address_book import AddressBook
from overlay.connection import Connection
from overlay.errors import ConnectionLost, DialError, PeerdError, TimedOut, UpgradeError
from overlay.gate import HandshakeGate
from overlay.identify import IDENTIFY, IDENTIFY_PUSH, decode_identify, encode_identify, without_own_suffix
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.noise.handshake import Handshake
from overlay.ping import PING, answer_pings
from overlay.ports import Listener, Ports
from overlay.stream import Priority, Stream
from overlay.upgrade import YAMUX, Upgrade

log = logging.getLogger(__name__)

Handler = Callable[[Stream], Awaitable[None]]
ConnectionListener = Callable[[Connection], None]
NETWORK_PROLOGUE = b"peerd-network:1:"
MAINTENANCE_S = 1.0
IDENTIFY_READ_MAX = limits.IDENTIFY_BYTES_MAX * limits.IDENTIFY_MESSAGES_MAX


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What a host is told."""

    agent: str = "peerd"
    network_secret: bytes = b""
    rate_limit_private: bool = False
    """Whether handshakes from loopback and private addresses are limited in rate too."""


@dataclass(frozen=True, slots=True)
class _Service:
    handler: Handler
    max_inbound_per_peer: int
    priority: Priority


class Host:
    """``async with Host(identity, ports, config) as host``. Every method is for the loop's thread."""

    def __init__(self, identity: Identity, ports: Ports, config: HostConfig | None = None) -> None:
        self.identity = identity
        self.ports = ports
        self.config = config or HostConfig()
        self.address_book = AddressBook()
        self._services: dict[str, _Service] = {}
        self._served: frozenset[str] = frozenset()
        self._connections: dict[PeerId, Connection] = {}
        self._upgrading: dict[Connection, float] = {}
        self._draining: dict[Connection, float] = {}
        self._listeners: list[Listener] = []
        self._dials: dict[PeerId, asyncio.Task[Connection | PeerdError]] = {}
        self._handler_tasks: set[asyncio.Task[None]] = set()
        self._inbound: dict[tuple[PeerId, str], int] = {}
        self._on_open: list[ConnectionListener] = []
        self._on_close: list[ConnectionListener] = []
        self._gate = HandshakeGate(exempt_private=not self.config.rate_limit_private)
        self._tasks: asyncio.TaskGroup | None = None
        self._maintenance: asyncio.Task[None] | None = None
        self._record_sequence = 0
        self._push_due = False
        self._closing = False
        self._prologue = NETWORK_PROLOGUE + self.config.network_secret if self.config.network_secret else b""

    # --- life ---

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._record_sequence = int(self.ports.wall_clock.now_s() * 1000)
        self.serve(IDENTIFY, self._answer_identify, max_inbound_per_peer=4)
        self.serve(IDENTIFY_PUSH, self._take_identify_push, max_inbound_per_peer=4)
        self.serve(PING, answer_pings, max_inbound_per_peer=2)
        self._maintenance = self._spawn(self._maintain(), "host maintenance")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = self._tasks
        assert tasks is not None
        self._closing = True
        for listener in self._listeners:
            listener.close()
        if self._maintenance is not None:
            self._maintenance.cancel()
        for dial in self._dials.values():
            dial.cancel()
        open_connections = [*self._connections.values(), *self._draining, *self._upgrading]
        for connection in open_connections:
            connection.close_nowait()
        await asyncio.gather(*(connection.close() for connection in open_connections))
        for task in list(self._handler_tasks):
            task.cancel()
        await tasks.__aexit__(None, None, None)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None, "use `async with Host(...)`"
        return self._tasks.create_task(work, name=name)

    # --- facts ---

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Full listening addresses, each ending in ``/p2p/ID``."""
        text = str(self.peer_id)
        return tuple(address.with_peer(text) for listener in self._listeners for address in listener.addresses)

    def connection(self, peer: PeerId) -> Connection | None:
        """The live connection to ``peer``, or None."""
        return self._connections.get(peer)

    def connections(self) -> tuple[Connection, ...]:
        return tuple(self._connections.values())

    def protocols_of(self, peer: PeerId) -> tuple[str, ...]:
        """What ``peer`` said it speaks; empty until identify ended."""
        return self.address_book.protocols(peer)

    def served_protocols(self) -> frozenset[str]:
        return self._served

    def add_connection_listener(self, on_open: ConnectionListener, on_close: ConnectionListener) -> None:
        """Hear of every kept connection, synchronously."""
        self._on_open.append(on_open)
        self._on_close.append(on_close)

    # --- serving ---

    def serve(
        self, protocol: str, handler: Handler, *, max_inbound_per_peer: int = limits.INBOUND_STREAMS_PER_PEER_DEFAULT,
        priority: Priority = Priority.CONTROL,
    ) -> None:  # fmt: skip
        """Hand inbound streams of ``protocol`` to ``handler``, each in a task of its own."""
        self._services[protocol] = _Service(handler, max_inbound_per_peer, priority)
        self._served = frozenset(self._services)
        self._push_due = True

    def unserve(self, protocol: str) -> None:
        """Stop accepting streams of ``protocol``; running handlers go on."""
        self._services.pop(protocol, None)
        self._served = frozenset(self._services)
        self._push_due = True

    async def listen(self, address: Multiaddr) -> tuple[Multiaddr, ...]:
        """Listen; returns the full addresses. Raises ListenError."""
        for transport in self.ports.transports:
            if transport.can_dial(address):
                listener = await transport.listen(address, self._accepting)
                self._listeners.append(listener)
                self._record_sequence += 1
                self._push_due = True
                return tuple(found.with_peer(str(self.peer_id)) for found in listener.addresses)
        raise DialError(f"No transport can listen on {address}; use an address like /ip4/0.0.0.0/tcp/4001.")

    # --- dialling ---

    async def connect(self, peer: PeerId | None, addresses: Sequence[Multiaddr] = ()) -> Connection:
        """A live connection, dialled if there is none. Raises DialError or UpgradeError. Cancel-safe.

        With ``peer`` None whoever answers is accepted (the first meeting, by a bare address).
        """
        now = self.ports.clock.now()
        if peer is None:
            return await self._dial_any(None, tuple(addresses))
        if peer == self.peer_id:
            raise DialError("This is the node itself; it needs no connection to itself.")
        live = self._connections.get(peer)
        if live is not None and live.is_open and not live.draining:
            return live
        if addresses:
            self.address_book.add(peer, (a for a in addresses if without_own_suffix(a, peer) is not None), now)
        dial = self._dials.get(peer)
        if dial is None:
            assert self._tasks is not None, "use `async with Host(...)`"
            dial = self._tasks.create_task(self._dial_peer(peer), name=f"dial {peer.short}")
            self._dials[peer] = dial
            dial.add_done_callback(lambda done: self._dial_ended(peer, done))
        outcome = await asyncio.shield(dial)
        if isinstance(outcome, PeerdError):
            raise outcome
        return outcome

    def _dial_ended(self, peer: PeerId, dial: asyncio.Task[Connection | PeerdError]) -> None:
        if self._dials.get(peer) is dial:
            del self._dials[peer]

    async def _dial_peer(self, peer: PeerId) -> Connection | PeerdError:
        """Shared by all who dial ``peer`` now; runs in the host's group, so a failure is returned, not raised."""
        now = self.ports.clock.now()
        known = self.address_book.addresses(peer, now)
        if not known:
            return DialError(f"No address of {peer} is known.")
        usable = [address for address in known if self.address_book.may_dial(address, now)]
        if not usable:
            return DialError(f"{peer} could not be reached a moment ago; it is tried again in a while.")
        try:
            return await self._dial_any(peer, tuple(usable))
        except PeerdError as error:
            return error

    async def _dial_any(self, peer: PeerId | None, addresses: tuple[Multiaddr, ...]) -> Connection:
        """Happy eyeballs: the next address starts when one failed or `DIAL_STAGGER_S` passed."""
        pending: list[asyncio.Task[Connection]] = []
        left = list(addresses)
        failure: PeerdError = DialError("No usable address was given; use one like /ip4/203.0.113.7/tcp/4001.")
        try:
            while left or pending:
                if left:
                    address = left.pop(0)
                    attempt = self._dial_one(peer, address)
                    pending.append(asyncio.get_running_loop().create_task(attempt, name=f"dial {address}"))
                done, _ = await asyncio.wait(
                    pending, timeout=limits.DIAL_STAGGER_S if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in [task for task in pending if task in done]:
                    pending.remove(task)
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not isinstance(error, PeerdError):
                        raise error
                    failure = error
            raise failure
        finally:
            for task in pending:
                task.cancel()

    async def _dial_one(self, peer: PeerId | None, address: Multiaddr) -> Connection:
        named = address.get("p2p")
        expected = peer or (PeerId.from_text(named) if named else None)
        transport = next((found for found in self.ports.transports if found.can_dial(address)), None)
        if transport is None:
            raise DialError(f"No transport can dial {address}.")
        made: list[Connection] = []

        def factory() -> Connection:
            made.append(self._new_connection(inbound=False, expected=expected))
            return made[-1]

        try:
            async with asyncio.timeout(limits.DIAL_TIMEOUT_S):
                connection = cast(Connection, await transport.dial(address, factory))
                connection.remote_address = address.without_peer()
                await asyncio.shield(connection.upgraded)
        except TimeoutError:
            self.address_book.failed(address, self.ports.clock.now())
            raise TimedOut(
                f"{address} did not answer within {limits.DIAL_TIMEOUT_S:.0f} s; is the peer running?"
            ) from None
        except PeerdError as error:
            self.address_book.failed(address, self.ports.clock.now())
            if isinstance(error, ConnectionLost):
                raise UpgradeError(
                    f"{address} closed the connection during the handshake; it may be in another network."
                ) from error
            raise
        finally:
            for connection in made:
                if not connection.is_open:
                    connection.abort(ConnectionLost("The dial was given up."))
        self.address_book.reached(connection.remote_peer, address, self.ports.clock.now())
        return self._connections.get(connection.remote_peer, connection)

    async def open_stream(
        self, peer: PeerId, protocol: str, *, addresses: Sequence[Multiaddr] = (),
        priority: Priority = Priority.CONTROL, timeout_s: float = limits.NEGOTIATE_TIMEOUT_S,
    ) -> Stream:  # fmt: skip
        """A stream that speaks ``protocol``, dialling if needed. Raises typed errors; cancel-safe.

        Where identify listed the protocol the caller's first bytes travel with the proposal, without a round trip.
        """
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self.connect(peer, addresses)
                stream = connection.open_stream(protocol, priority)
                if protocol not in self.protocols_of(peer):
                    try:
                        await stream.wait_negotiated()
                    except asyncio.CancelledError:
                        stream.reset()
                        raise
                return stream
        except TimeoutError:
            raise TimedOut(f"{peer} did not open a {protocol} stream within {timeout_s:.0f} s.") from None

    # --- connections, told by themselves ---

    def _accepting(self) -> Connection:
        return self._new_connection(inbound=True, expected=None)

    def _new_connection(self, *, inbound: bool, expected: PeerId | None) -> Connection:
        def upgrade() -> Upgrade:
            token = self.ports.randomness.token
            handshake = Handshake(
                self.identity,
                X25519PrivateKey.from_private_bytes(token(32)),
                X25519PrivateKey.from_private_bytes(token(32)),
                initiator=not inbound,
                expected_peer=expected,
                muxers=(YAMUX,),
                prologue=self._prologue,
            )
            return Upgrade(handshake, initiator=not inbound)

        connection = Connection(self, upgrade, self.ports.clock.now, is_inbound=inbound)
        self._upgrading[connection] = self.ports.clock.now() + limits.UPGRADE_TIMEOUT_S
        return connection

    def connection_admitted(self, connection: Connection) -> bool:
        """Whether a socket may start its handshake: the limits on how many, and on how fast from one address."""
        if not connection.is_inbound:
            return True
        upgrading = sum(1 for found in self._upgrading if found.is_inbound)
        room = upgrading <= limits.HANDSHAKES_MAX and len(self._connections) < limits.CONNECTIONS_MAX
        return room and not self._closing and self._gate.admit(connection.remote_address, self.ports.clock.now())

    def connection_upgraded(self, connection: Connection) -> None:
        self._upgrading.pop(connection, None)
        peer = connection.remote_peer
        now = self.ports.clock.now()
        other = self._connections.get(peer)
        if other is not None and other.is_open and not self._wins(connection, other):
            self._drain(connection, now)
        else:
            self._connections[peer] = connection
            if other is not None and other.is_open:
                self._drain(other, now)
            else:
                for listener in self._on_open:
                    listener(connection)
        connection.session.ping(now)
        self._spawn(self._identify(connection), f"identify {peer.short}")

    def _wins(self, new: Connection, old: Connection) -> bool:
        """Of two simultaneous connections the one whose initiator has the smaller peer id stays, on both sides."""
        if new.is_inbound == old.is_inbound:
            return True
        initiator = new.remote_peer if new.is_inbound else self.peer_id
        other_initiator = old.remote_peer if old.is_inbound else self.peer_id
        return initiator < other_initiator

    def _drain(self, connection: Connection, now: float) -> None:
        self._draining[connection] = now + limits.DUPLICATE_DRAIN_S
        same = [found for found in self._draining if found.remote_peer == connection.remote_peer]
        for surplus in same[: max(0, len(same) - limits.DUPLICATES_PER_PEER)]:
            surplus.close_nowait()

    def connection_ended(self, connection: Connection, error: PeerdError) -> None:
        self._upgrading.pop(connection, None)
        self._draining.pop(connection, None)
        if not connection.was_upgraded or self._connections.get(connection.remote_peer) is not connection:
            return
        peer = connection.remote_peer
        del self._connections[peer]
        heir = next((found for found in self._draining if found.remote_peer == peer and found.is_open), None)
        if heir is not None:
            del self._draining[heir]
            self._connections[peer] = heir
            return
        for listener in self._on_close:
            listener(connection)

    def stream_opened(self, connection: Connection, stream: Stream) -> None:
        """An inbound stream, before its protocol is known: `Connection.reap` bounds how long that takes."""

    def stream_ready(self, connection: Connection, stream: Stream) -> None:
        service = self._services.get(stream.protocol)
        key = (connection.remote_peer, stream.protocol)
        count = self._inbound.get(key, 0)
        if service is None or self._closing or count >= service.max_inbound_per_peer:
            stream.reset("limit")
            return
        self._inbound[key] = count + 1
        stream.priority = service.priority
        if service.priority in (Priority.DECODE, Priority.BULK):
            connection.session.grant(stream.lane, limits.EXTRA_WINDOW_BYTES)
        task = self._spawn(self._handle(stream, service, key), f"{stream.protocol} from {connection.remote_peer.short}")
        self._handler_tasks.add(task)
        task.add_done_callback(self._handler_tasks.discard)

    async def _handle(self, stream: Stream, service: _Service, key: tuple[PeerId, str]) -> None:
        try:
            await service.handler(stream)
            await stream.close()
        except PeerdError as error:
            log.debug("%s from %s ended: %s", stream.protocol, stream.remote_peer.short, error)
            stream.reset(error.code)
        except Exception:
            log.exception("the handler of %s failed; its stream was reset", stream.protocol)
            stream.reset("internal")
        finally:
            self._inbound[key] -= 1
            if not self._inbound[key]:
                del self._inbound[key]

    # --- identify ---

    def _identify_message(self, connection: Connection) -> bytes:
        protocols = sorted(self._served)
        return encode_identify(
            self.identity, self.addresses[: limits.ADDRESSES_PER_PEER], protocols, connection.remote_address,
            self.config.agent, self._record_sequence,
        )  # fmt: skip

    async def _answer_identify(self, stream: Stream) -> None:
        await stream.write(self._identify_message(stream.connection))
        await stream.close_write()

    async def _take_identify_push(self, stream: Stream) -> None:
        self._identified(stream.remote_peer, await _read_to_end(stream, IDENTIFY_READ_MAX))

    async def _identify(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(limits.IDENTIFY_TIMEOUT_S):
                stream = connection.open_stream(IDENTIFY)
                self._identified(connection.remote_peer, await _read_to_end(stream, IDENTIFY_READ_MAX))
                await stream.close_write()
        except (PeerdError, TimeoutError) as error:
            log.debug("identify with %s failed: %s", connection.remote_peer.short, error)

    def _identified(self, peer: PeerId, data: bytes) -> None:
        found = decode_identify(data, peer)
        now = self.ports.clock.now()
        self.address_book.identified(peer, found.addresses, found.protocols, found.record_sequence, now)

    async def _push_identify(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(limits.IDENTIFY_TIMEOUT_S):
                stream = connection.open_stream(IDENTIFY_PUSH)
                await stream.write(self._identify_message(connection))
                await stream.close()
        except (PeerdError, TimeoutError) as error:
            log.debug("identify push to %s failed: %s", connection.remote_peer.short, error)

    # --- maintenance ---

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(MAINTENANCE_S)
            self.maintain(self.ports.clock.now())

    def maintain(self, now: float) -> None:
        """Once a second: overdue handshakes, silent connections, drained duplicates, identify pushes."""
        for connection, deadline in list(self._upgrading.items()):
            if now > deadline:
                connection.abort(UpgradeError("The handshake took too long."))
        for connection, deadline in list(self._draining.items()):
            if now > deadline and not connection.session.lanes:
                connection.close_nowait()
        for connection in [*self._connections.values(), *self._draining]:
            connection.reap(now)
            sent = connection.session.ping_sent_at
            quiet = now - connection.last_received
            if sent is not None and quiet > limits.SILENT_DEAD_S:
                connection.abort(ConnectionLost("The peer fell silent."))
            elif quiet > limits.PING_IDLE_S and sent is None:
                connection.session.ping(now)
                connection.pump()
        if self._push_due:
            self._push_due = False
            self._record_sequence += 1
            for connection in self._connections.values():
                self._spawn(self._push_identify(connection), f"identify push {connection.remote_peer.short}")


async def _read_to_end(stream: Stream, limit: int) -> bytes:
    out = bytearray()
    while chunk := await stream.read():
        out += chunk
        if len(out) > limit:
            raise UpgradeError("A peer sent an identify message that is too long.")
    return bytes(out)
