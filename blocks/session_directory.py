"""Which of this node's drivers a session's results belong to: a node serves sessions and drives others."""

from __future__ import annotations

from typing import Protocol

from overlay.rpc.types import Message


class ResultReceiver(Protocol):
    """A driver's ear for its data lane."""

    def data_message(self, message: Message, origin: bytes, verified: bool) -> None: ...


class SessionDirectory:
    """Session id to driver; a session that nobody drives here has none."""

    def __init__(self) -> None:
        self._drivers: dict[bytes, ResultReceiver] = {}

    def add(self, session: bytes, driver: ResultReceiver) -> None:
        self._drivers[session] = driver

    def remove(self, session: bytes) -> None:
        self._drivers.pop(session, None)

    def find(self, session: object) -> ResultReceiver | None:
        return self._drivers.get(session) if isinstance(session, bytes) else None

    def __len__(self) -> int:
        return len(self._drivers)
