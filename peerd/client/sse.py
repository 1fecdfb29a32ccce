"""Server-sent events from bytes (WHATWG HTML, section 9.2), as far as the daemon uses them: data lines and comments.

Pure and bounded.
"""

from __future__ import annotations

from peerd.client.errors import BadAnswer

EVENT_BYTES_MAX = 16 << 20

DATA = "data"
COMMENT = "comment"


class EventParser:
    """Takes bytes in any pieces; gives (`DATA` or `COMMENT`, text) pairs, one for each event and each comment line."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._held_bytes = 0

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        """Returns what became complete. Raises BadAnswer when one event outgrows `EVENT_BYTES_MAX`."""
        self._held_bytes += len(data)
        if self._held_bytes > EVENT_BYTES_MAX:
            raise BadAnswer("The daemon sent an event that is too large; is it of another version?")
        *lines, self._rest = (self._rest + data).split(b"\n")
        found: list[tuple[str, str]] = []
        for raw in lines:
            self._take(raw.rstrip(b"\r").decode("utf-8", "replace"), found)
        return found

    def _take(self, line: str, found: list[tuple[str, str]]) -> None:
        if not line:
            if self._data:
                found.append((DATA, "\n".join(self._data)))
                self._data = []
            self._held_bytes = len(self._rest)
        elif line.startswith(":"):
            found.append((COMMENT, line[1:].strip()))
        elif line.startswith("data:"):
            self._data.append(line[5:].removeprefix(" "))
