"""Waiting for a change, at no cost while nobody waits: streams come by the thousand, and few are ever waited on."""

from __future__ import annotations

import asyncio


class Wake:
    """Who waits looks at its condition, waits for a change, and looks again."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    def wake(self) -> None:
        """Something has changed: all who wait go on."""
        event, self._event = self._event, None
        if event is not None:
            event.set()

    async def wait(self) -> None:
        """Until the next `wake`. Cancel-safe."""
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()
