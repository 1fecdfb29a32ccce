"""How a peer is reached: its addresses tried one after the other, each started when the last failed or took too long.

Owns no state but what the address book learns. Knows nothing of which connection of a peer is kept: that's the host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from overlay import limits
from overlay.address_book import AddressBook
from overlay.connection import Connection
from overlay.errors import ConnectionLost, DialError, PeerdError, TimedOut, UpgradeError
from overlay.identity import PeerId
from overlay.multiaddr import Multiaddr
from overlay.ports import Ports

NewConnection = Callable[[PeerId | None], Connection]
"""An outbound connection, not yet open, that accepts only that peer (None: whoever answers)."""


class Dialler:
    """See the module."""

    def __init__(self, ports: Ports, address_book: AddressBook, new_connection: NewConnection) -> None:
        self._ports = ports
        self._address_book = address_book
        self._new_connection = new_connection

    async def dial_known(self, peer: PeerId) -> Connection | PeerdError:
        """By the addresses of the book. A failure is returned, not raised: the call is shared by all who dial that peer."""
        now = self._ports.clock.now()
        known = self._address_book.addresses(peer, now)
        if not known:
            return DialError(f"No address of {peer} is known.")
        usable = [address for address in known if self._address_book.may_dial(address, now)]
        if not usable:
            return DialError(f"{peer} could not be reached a moment ago; it is tried again in a while.")
        try:
            return await self.dial(peer, tuple(usable))
        except PeerdError as error:
            return error

    async def dial(self, peer: PeerId | None, addresses: tuple[Multiaddr, ...]) -> Connection:
        """Happy eyeballs: the next address starts when one failed or `DIAL_STAGGER_S` passed."""
        if len(addresses) == 1:
            return await self._dial_one(peer, addresses[0])
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
        transport = next((found for found in self._ports.transports if found.can_dial(address)), None)
        if transport is None:
            raise DialError(f"No transport can dial {address}.")
        made: list[Connection] = []

        def factory() -> Connection:
            made.append(self._new_connection(expected))
            return made[-1]

        try:
            async with asyncio.timeout(limits.DIAL_TIMEOUT_S):
                connection = cast(Connection, await transport.dial(address, factory))
                connection.remote_address = address.without_peer()
                await asyncio.shield(connection.upgraded)
        except TimeoutError:
            self._address_book.failed(address, self._ports.clock.now())
            raise TimedOut(
                f"{address} did not answer within {limits.DIAL_TIMEOUT_S:.0f} s; is the peer running?"
            ) from None
        except PeerdError as error:
            self._address_book.failed(address, self._ports.clock.now())
            if isinstance(error, ConnectionLost):
                raise UpgradeError(
                    f"{address} closed the connection during the handshake; it may be in another network."
                ) from error
            raise
        finally:
            for connection in made:
                if not connection.is_open:
                    connection.abort(ConnectionLost("The dial was given up."))
        self._address_book.reached(connection.remote_peer, address, self._ports.clock.now())
        return connection
