"""The node's end of the overlay: listens, dials, keeps one connection per pair of peers, hands streams to handlers.

Owns the task group of everything below it, the address book and the limits on handshakes. What handlers do is `overlay.services`'.
Knows nothing of DHT, RPC or models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from overlay import limits
from overlay.address_book import AddressBook
from overlay.connection import Connection
from overlay.dialling import Dialler
from overlay.errors import ConnectionLost, DialError, PeerdError, StreamReset, TimedOut, UpgradeError
from overlay.gate import HandshakeGate
from overlay.identify import IDENTIFY, IDENTIFY_PUSH, without_own_suffix
from overlay.identity import Identity, PeerId
from overlay.idle import IdleConnections
from overlay.introductions import Introduced, Introductions
from overlay.multiaddr import Multiaddr
from overlay.noise.handshake import Handshake
from overlay.pacing import UrgentTraffic
from overlay.ping import PING, answer_pings
from overlay.ports import Listener, Ports, Randomness
from overlay.services import Handler, Service, Services
from overlay.stream import Priority, Stream
from overlay.upgrade import YAMUX, Securing, Upgrade

ConnectionListener = Callable[[Connection], None]
NETWORK_PROLOGUE = b"peerd-network:1:"
MAINTENANCE_S = 2.0


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What a host is told."""

    agent: str = "peerd"
    network_secret: bytes = b""
    rate_limit_private: bool = False
    """Whether handshakes from loopback and private addresses are limited in rate too."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What one end of a new connection knows before its handshake."""

    identity: Identity
    initiator: bool
    expected_peer: PeerId | None
    prologue: bytes


Secure = Callable[[Meeting, Randomness], Securing]
"""How connections are secured: Noise, except where a simulation of thousands of hosts spares itself the arithmetic."""


def secure_with_noise(meeting: Meeting, randomness: Randomness) -> Handshake:
    """Noise XX with fresh keys."""
    return Handshake(
        meeting.identity,
        X25519PrivateKey.from_private_bytes(randomness.token(32)),
        X25519PrivateKey.from_private_bytes(randomness.token(32)),
        initiator=meeting.initiator,
        expected_peer=meeting.expected_peer,
        muxers=(YAMUX,),
        prologue=meeting.prologue,
    )


class Keep:
    """Holds a peer's connection open, if there is one, until released: a context manager."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Once; again does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Host:
    """``async with Host(identity, ports, config) as host``. Every method is for the loop's thread."""

    def __init__(
        self, identity: Identity, ports: Ports, config: HostConfig | None = None, *, secure: Secure = secure_with_noise
    ) -> None:
        self.identity = identity
        self.ports = ports
        self.config = config or HostConfig()
        self.address_book = AddressBook()
        self._secure = secure
        self._dialler = Dialler(ports, self.address_book, self._dialling)
        self._introductions = Introductions(
            identity,
            self.config.agent,
            ports.clock,
            self.address_book,
            lambda: (self.addresses, self._services.protocols),
        )
        self._services = Services(self._spawn)
        self.stream_ready = self._services.begin
        """Told by connections: a peer opened a stream, and both agreed on its protocol."""
        self._connections: dict[PeerId, Connection] = {}
        self._upgrading: dict[Connection, float] = {}
        self._draining: dict[Connection, float] = {}
        self._listeners: list[Listener] = []
        self._told: tuple[tuple[Multiaddr, ...], tuple[Multiaddr, ...]] = ((), ())
        self._dials: dict[PeerId, asyncio.Task[Connection | PeerdError]] = {}
        self._on_open: list[ConnectionListener] = []
        self._on_close: list[ConnectionListener] = []
        self.urgent = UrgentTraffic()
        self._gate = HandshakeGate(exempt_private=not self.config.rate_limit_private)
        self._tasks: asyncio.TaskGroup | None = None
        self._maintenance: asyncio.Task[None] | None = None
        self._keeps: dict[PeerId, int] = {}
        self._busy = asyncio.Event()
        self._push_due = False
        self._idle = IdleConnections()
        self._changed_at = 0.0
        self._closing = False
        self._prologue = NETWORK_PROLOGUE + self.config.network_secret if self.config.network_secret else b""

    # --- life ---

    async def __aenter__(self) -> Self:
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._introductions.record_sequence = int(self.ports.wall_clock.now_s() * 1000)
        self.serve(IDENTIFY, self._introductions.answer, max_inbound_per_peer=4)
        self.serve(IDENTIFY_PUSH, self._introductions.take_push, max_inbound_per_peer=4)
        self.serve(PING, answer_pings, max_inbound_per_peer=2)
        self._maintenance = self._spawn(self._maintain(), "host maintenance")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tasks = self._tasks
        assert tasks is not None
        self._closing = True
        self._services.refuse()
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
        self._services.cancel()
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
        """Full listening addresses, each ending in ``/p2p/ID``; the same object while they are the same."""
        bare = tuple([address for listener in self._listeners for address in listener.addresses])
        if bare != self._told[0]:
            text = str(self.peer_id)
            self._told = bare, tuple(address.with_peer(text) for address in bare)
        return self._told[1]

    def connection(self, peer: PeerId) -> Connection | None:
        """The live connection to ``peer``, or None."""
        return self._connections.get(peer)

    def connections(self) -> tuple[Connection, ...]:
        return tuple(self._connections.values())

    def rtt_s(self, peer: PeerId) -> float | None:
        """The round trip to ``peer``: of the live connection, or of one that ended not long ago."""
        live = self._connections.get(peer)
        if live is not None and live.rtt_s is not None:
            return live.rtt_s
        return self.address_book.rtt_s(peer, self.ports.clock.now())

    def keep(self, peer: PeerId) -> Keep:
        """From now on a connection to ``peer`` is not left for being idle, and is pinged. Dials nothing."""
        self._keeps[peer] = self._keeps.get(peer, 0) + 1
        return Keep(lambda: self._unkeep(peer))

    def _unkeep(self, peer: PeerId) -> None:
        self._keeps[peer] -= 1
        if not self._keeps[peer]:
            del self._keeps[peer]

    def protocols_of(self, peer: PeerId) -> tuple[str, ...]:
        """What ``peer`` said it speaks; empty until identify ended."""
        return self.address_book.protocols(peer)

    def served_protocols(self) -> frozenset[str]:
        return self._services.protocols

    def add_connection_listener(self, on_open: ConnectionListener, on_close: ConnectionListener) -> None:
        """Hear of every connection that is used, synchronously; one that was left (`Connection.was_left`) is closed for its users."""
        self._on_open.append(on_open)
        self._on_close.append(on_close)

    def add_introduction_listener(self, listener: Introduced) -> None:
        """Hear of every peer that said what it speaks."""
        self._introductions.add_listener(listener)

    # --- serving ---

    def serve(
        self, protocol: str, handler: Handler, *, max_inbound_per_peer: int = limits.INBOUND_STREAMS_PER_PEER_DEFAULT,
        priority: Priority = Priority.CONTROL,
    ) -> None:  # fmt: skip
        """Hand inbound streams of ``protocol`` to ``handler``, each in a task of its own."""
        self._services.add(protocol, Service(handler, max_inbound_per_peer, priority))
        self._push_soon()

    def unserve(self, protocol: str) -> None:
        """Stop accepting streams of ``protocol``; running handlers go on."""
        self._services.remove(protocol)
        self._push_soon()

    async def listen(self, address: Multiaddr) -> tuple[Multiaddr, ...]:
        """Listen; returns the full addresses. Raises ListenError."""
        for transport in self.ports.transports:
            if transport.can_dial(address):
                listener = await transport.listen(address, self._accepting)
                self._listeners.append(listener)
                self._push_soon()
                return tuple(found.with_peer(str(self.peer_id)) for found in listener.addresses)
        raise DialError(f"No transport can listen on {address}; use an address like /ip4/0.0.0.0/tcp/4001.")

    # --- dialling ---

    async def connect(self, peer: PeerId | None, addresses: Sequence[Multiaddr] = ()) -> Connection:
        """A live connection, dialled if there is none. Raises DialError or UpgradeError. Cancel-safe.

        With ``peer`` None whoever answers is accepted (the first meeting, by a bare address).
        """
        now = self.ports.clock.now()
        if peer is None:
            met = await self._dialler.dial(None, tuple(addresses))
            return self._connections.get(met.remote_peer, met)
        if peer == self.peer_id:
            raise DialError("This is the node itself; it needs no connection to itself.")
        live = self._connections.get(peer)
        if live is not None and live.is_open and not live.was_left:
            return live
        if addresses:
            self.address_book.add(peer, (a for a in addresses if without_own_suffix(a, peer) is not None), now)
        dial = self._dials.get(peer)
        if dial is None:
            assert self._tasks is not None, "use `async with Host(...)`"
            dial = self._tasks.create_task(self._dialler.dial_known(peer), name=f"dial {peer.short}")
            self._dials[peer] = dial
            dial.add_done_callback(lambda done: self._dial_ended(peer, done))
        outcome = await asyncio.shield(dial)
        if isinstance(outcome, PeerdError):
            raise outcome
        return self._connections.get(peer, outcome)

    def _dial_ended(self, peer: PeerId, dial: asyncio.Task[Connection | PeerdError]) -> None:
        if self._dials.get(peer) is dial:
            del self._dials[peer]

    async def open_stream(
        self, peer: PeerId, protocol: str, *, addresses: Sequence[Multiaddr] = (),
        priority: Priority = Priority.CONTROL, timeout_s: float | None = limits.NEGOTIATE_TIMEOUT_S,
        lazily: bool = False,
    ) -> Stream:  # fmt: skip
        """A stream that speaks ``protocol``, dialling if needed. Raises typed errors; cancel-safe.

        Where identify listed the protocol, or ``lazily``, the caller's first bytes travel with the proposal, without a round trip; a
        refusal then comes when the stream is read. ``timeout_s`` None is for callers with a deadline of their own.
        """
        if timeout_s is None:
            return await self._open_or_again(peer, protocol, addresses, priority, lazily)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._open_or_again(peer, protocol, addresses, priority, lazily)
        except TimeoutError:
            raise TimedOut(f"{peer} did not open a {protocol} stream within {timeout_s:.0f} s.") from None

    async def _open_or_again(
        self, peer: PeerId, protocol: str, addresses: Sequence[Multiaddr], priority: Priority, lazily: bool
    ) -> Stream:
        """A connection that the peer is leaving just now is replaced by a new one, once."""
        try:
            return await self._open_stream(peer, protocol, addresses, priority, lazily)
        except _Left:
            return await self._open_stream(peer, protocol, addresses, priority, lazily)

    async def _open_stream(
        self, peer: PeerId, protocol: str, addresses: Sequence[Multiaddr], priority: Priority, lazily: bool
    ) -> Stream:
        connection = await self.connect(peer, addresses)
        try:
            stream = connection.open_stream(protocol, priority)
            if not lazily and protocol not in self.protocols_of(peer):
                self._ask_who(connection)
                try:
                    await stream.wait_negotiated()
                except asyncio.CancelledError:
                    stream.reset()
                    raise
        except (ConnectionLost, StreamReset) as error:
            if connection.was_left:
                raise _Left(str(error)) from error
            raise
        return stream

    # --- connections, told by themselves ---

    def _accepting(self) -> Connection:
        return self._new_connection(inbound=True, expected=None)

    def _dialling(self, expected: PeerId | None) -> Connection:
        return self._new_connection(inbound=False, expected=expected)

    def _new_connection(self, *, inbound: bool, expected: PeerId | None) -> Connection:
        def upgrade() -> Upgrade:
            meeting = Meeting(self.identity, not inbound, expected, self._prologue)
            return Upgrade(self._secure(meeting, self.ports.randomness), initiator=not inbound)

        connection = Connection(self, upgrade, self.ports.clock.now, is_inbound=inbound)
        connection.is_first_meeting = not inbound and expected is None
        self._upgrading[connection] = self.ports.clock.now() + limits.UPGRADE_TIMEOUT_S
        self._busy.set()
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
        if connection.is_first_meeting:
            self._ask_who(connection)
        self._idle.leave(self._connections, len(self._draining), self._keeps, now)

    def _ask_who(self, connection: Connection) -> None:
        """Who answered at a bare address is asked at once, and whoever dialled us when that turns out to last; whom we dial by name when
        more is wanted of it than that. Those who come for one question, as most do in a DHT, say with it where they are."""
        if not connection.was_left and self._introductions.is_due(connection.remote_peer):
            self._spawn(self._introductions.ask(connection), f"identify {connection.remote_peer.short}")

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
        if connection.was_upgraded:
            self._remember_rtt(connection)
        if not connection.was_upgraded or self._connections.get(connection.remote_peer) is not connection:
            return
        peer = connection.remote_peer
        del self._connections[peer]
        heir = next(
            (found for found in self._draining if found.remote_peer == peer and found.is_open and not found.was_left),
            None,
        )
        if heir is not None:
            del self._draining[heir]
            self._connections[peer] = heir
            self._idle.look_again()
            return
        for listener in self._on_close:
            listener(connection)

    def connection_left(self, connection: Connection) -> None:
        """One of the two said go-away: nothing new begins on it, what runs goes on, and another may be dialled."""
        self._draining[connection] = self.ports.clock.now() + limits.LEAVE_S
        if self._connections.get(connection.remote_peer) is connection:
            self._remember_rtt(connection)
            del self._connections[connection.remote_peer]
            for listener in self._on_close:
                listener(connection)

    def _remember_rtt(self, connection: Connection) -> None:
        if connection.rtt_s is not None:
            self.address_book.measured(connection.remote_peer, connection.rtt_s, self.ports.clock.now())

    # --- maintenance ---

    def _push_soon(self) -> None:
        self._introductions.record_sequence += 1
        self._changed_at = self.ports.clock.now()
        self._push_due = True
        self._busy.set()

    async def _maintain(self) -> None:
        """A host without connections has nothing to look after, and sleeps."""
        while True:
            self._busy.clear()
            if not (self._connections or self._upgrading or self._draining or self._push_due):
                await self._busy.wait()
            await asyncio.sleep(MAINTENANCE_S)
            self.maintain(self.ports.clock.now())

    def maintain(self, now: float) -> None:
        """Every `MAINTENANCE_S`: overdue handshakes, silent and idle connections, those that drain, identify pushes."""
        for connection, deadline in list(self._upgrading.items()):
            if now > deadline:
                connection.abort(UpgradeError("The handshake took too long."))
        for connection, deadline in list(self._draining.items()):
            if now > deadline:
                connection.finish_leaving()
        keeps = self._keeps
        for connection in [*self._connections.values(), *self._draining]:
            session = connection.session
            if session.lanes or session.ping_sent_at or (keeps and connection.remote_peer in keeps):
                self._check_alive(connection, now)
                if connection.is_inbound and connection.is_open:
                    self._ask_who(connection)
        self._idle.leave(self._connections, len(self._draining), self._keeps, now)
        if self._push_due:
            self._push_due = False
            for connection in self._connections.values():
                if connection.opened_at <= self._changed_at:  # a later one is told of the change if it asks
                    self._spawn(self._introductions.push(connection), f"identify push {connection.remote_peer.short}")

    def _check_alive(self, connection: Connection, now: float) -> None:
        """Only for connections in use and for those that somebody keeps: the others end for being idle."""
        connection.reap(now)
        sent = connection.session.ping_sent_at
        quiet = now - connection.last_received
        if sent is not None and quiet > limits.SILENT_DEAD_S:
            connection.abort(ConnectionLost("The peer fell silent."))
        elif quiet > limits.PING_IDLE_S and sent is None:
            connection.session.ping(now)
        connection.pump()


class _Left(ConnectionLost):
    """The connection that was there was being left by the peer: another one is worth a try."""
