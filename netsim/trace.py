"""What happened in a run: a hash over every event, and the last lines of each host and session for when something fails.

Owns the hash and the bounded rings. Two runs of one seed must give the same digest, so a line may hold nothing that differs
between processes: no addresses of objects, no wall time, no order of a set. Notes are for people and aren't hashed.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable
from hashlib import blake2b

DIGEST_BYTES = 16
BATCH_LINES = 512
"""Lines that are joined before they are hashed: one call instead of many."""
LINES_PER_STORY = 40
TALK = ("data", "fin", "dial", "open", "accept", "refused", "broken", "end")
"""What every host does all the time: of these a story has fewer lines, so that they don't drown the others."""
TALK_PER_STORY = 12
SESSIONS_AT_MOST = 4096
"""Sessions whose stories are kept; the one that was silent for longest is forgotten first."""
NOTE_CHARACTERS = 400

_OBJECT_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class Trace:
    """``now`` gives virtual seconds. Every line has a kind (one word), a host and a text without line ends."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start_s = now()
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self._batch: list[str] = []
        self._hosts: dict[str, deque[str]] = {}
        self._talk: dict[str, deque[str]] = {}
        self._sessions: OrderedDict[str, deque[str]] = OrderedDict()
        self._lines = 0
        self._is_closed = False
        self.listener: Callable[[str], None] | None = None
        """Hears every line and note as it comes; for ``--verbose``."""

    @property
    def lines(self) -> int:
        """Lines hashed so far."""
        return self._lines

    def add(self, kind: str, host: str, text: str, session: str = "") -> None:
        """One event, hashed, and remembered for ``host`` and (where one is named) ``session``."""
        if self._is_closed:
            return
        line = f"{self._now()!r} {kind} {host} {text}"
        batch = self._batch
        batch.append(line)
        if len(batch) >= BATCH_LINES:
            self._flush()
        rings, length = (self._talk, TALK_PER_STORY) if kind in TALK else (self._hosts, LINES_PER_STORY)
        ring = rings.get(host)
        if ring is None:
            ring = rings[host] = deque(maxlen=length)
        ring.append(line)
        if session:
            self._remember_session(session, line)
        if self.listener is not None:
            self.listener(line)

    def note(self, host: str, text: str, session: str = "") -> None:
        """Remembered for the story, never hashed: what a log line or an exception says."""
        if self._is_closed:
            return
        flat = _OBJECT_ADDRESS.sub("0x...", " | ".join(text.splitlines()))[:NOTE_CHARACTERS]
        line = f"{self._now()!r} note {host} {flat}"
        self._hosts.setdefault(host, deque(maxlen=LINES_PER_STORY)).append(line)
        if session:
            self._remember_session(session, line)
        if self.listener is not None:
            self.listener(line)

    def story(self, name: str) -> tuple[str, ...]:
        """The last lines of a session or a host, oldest first, with the seconds since the start; empty when nothing is known of it."""
        lines = list(self._sessions.get(name, ()))
        if not lines:
            lines = [*self._hosts.get(name, ()), *self._talk.get(name, ())]
            lines.sort(key=lambda line: float(line.partition(" ")[0]))
        told = []
        for line in lines:
            at_s, _, rest = line.partition(" ")
            told.append(f"{float(at_s) - self._start_s:12.6f}  {rest}")
        return tuple(told)

    def hexdigest(self) -> str:
        """Of every line so far; the trace may go on."""
        self._flush()
        return self._hash.hexdigest()

    def close(self) -> None:
        """The run is over: what is still said while it is taken down isn't heard."""
        self._is_closed = True

    def _remember_session(self, session: str, line: str) -> None:
        ring = self._sessions.get(session)
        if ring is None:
            ring = self._sessions[session] = deque(maxlen=LINES_PER_STORY)
            if len(self._sessions) > SESSIONS_AT_MOST:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(session)
        ring.append(line)

    def _flush(self) -> None:
        if self._batch:
            self._lines += len(self._batch)
            self._batch.append("")
            self._hash.update("\n".join(self._batch).encode())
            self._batch.clear()
