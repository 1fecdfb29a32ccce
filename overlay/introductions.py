"""Who is at the other end and what it speaks: identify and identify/push over streams (libp2p specs: identify/README).

A peer is asked when something is wanted of it, or its connection lasts, not at every connection: they come and go with what runs over
them, and a peer that told within `IDENTIFY_FRESH_S` would say the same again; one that didn't is left in peace for a while. Owns the
sequence of our own record. What is learned goes to the address book.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from overlay import limits
from overlay.address_book import AddressBook
from overlay.connection import Connection
from overlay.errors import PeerdError, UpgradeError
from overlay.identify import IDENTIFY, IDENTIFY_PUSH, decode_identify, encode_own, message_with
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Clock
from overlay.stream import Stream

log = logging.getLogger(__name__)

READ_MAX = limits.IDENTIFY_BYTES_MAX * limits.IDENTIFY_MESSAGES_MAX

Introduced = Callable[[PeerId], None]


class Introductions:
    """See the module. ``own`` gives our addresses and protocols of the moment."""

    def __init__(
        self, identity: Identity, agent: str, clock: Clock, book: AddressBook,
        own: Callable[[], tuple[tuple[Multiaddr, ...], frozenset[str]]],
    ) -> None:  # fmt: skip
        self._identity = identity
        self._agent = agent
        self._clock = clock
        self._book = book
        self._own = own
        self._listeners: list[Introduced] = []
        self.record_sequence = 0
        self._said: tuple[tuple[object, ...], bytes] | None = None

    def add_listener(self, listener: Introduced) -> None:
        """Hear of every peer that said what it speaks, synchronously."""
        self._listeners.append(listener)

    def is_due(self, peer: PeerId) -> bool:
        """Whether it is unknown or too long ago what ``peer`` speaks, and nobody has just asked."""
        now = self._clock.now()
        is_stale = now - self._book.identified_at(peer) > limits.IDENTIFY_FRESH_S
        return is_stale and now - self._book.asked_at(peer) > limits.IDENTIFY_RETRY_S

    def _message(self, connection: Connection) -> bytes:
        addresses, protocols = self._own()
        facts = (addresses, protocols, self.record_sequence)
        if self._said is None or self._said[0] != facts:  # signed once, not for everybody who asks
            told = addresses[: limits.ADDRESSES_PER_PEER]
            own = encode_own(self._identity, told, sorted(protocols), self._agent, self.record_sequence)
            self._said = facts, own
        return message_with(self._said[1], connection.remote_address)

    async def answer(self, stream: Stream) -> None:
        """The handler of `IDENTIFY`."""
        await stream.write(self._message(stream.connection))
        await stream.close_write()

    async def take_push(self, stream: Stream) -> None:
        """The handler of `IDENTIFY_PUSH`."""
        self._learned(stream.remote_peer, await _read_to_end(stream))

    async def ask(self, connection: Connection) -> None:
        """Ask who is there; a failure is nobody's."""
        self._book.asked(connection.remote_peer, self._clock.now())
        try:
            async with asyncio.timeout(limits.IDENTIFY_TIMEOUT_S):
                stream = connection.open_stream(IDENTIFY)
                self._learned(connection.remote_peer, await _read_to_end(stream))
                await stream.close_write()
        except (PeerdError, TimeoutError) as error:
            log.debug("identify with %s failed: %s", connection.remote_peer.short, error)

    async def push(self, connection: Connection) -> None:
        """Tell a connected peer what has changed here."""
        try:
            async with asyncio.timeout(limits.IDENTIFY_TIMEOUT_S):
                stream = connection.open_stream(IDENTIFY_PUSH)
                await stream.write(self._message(connection))
                await stream.close()
        except (PeerdError, TimeoutError) as error:
            log.debug("identify push to %s failed: %s", connection.remote_peer.short, error)

    def _learned(self, peer: PeerId, data: bytes) -> None:
        found = decode_identify(data, peer)
        now = self._clock.now()
        self._book.identified(peer, found.addresses, found.protocols, found.record_sequence, now)
        for listener in self._listeners:
            listener(peer)


async def _read_to_end(stream: Stream) -> bytes:
    out = bytearray()
    while chunk := await stream.read():
        out += chunk
        if len(out) > READ_MAX:
            raise UpgradeError("A peer sent an identify message that is too long.")
    return bytes(out)
