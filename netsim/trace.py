"""What happened in a run: a hash over every event, and the last lines of each host and session for when something fails.

Owns the hash and the bounded rings. Two runs of one seed must give the same digest, so a line may hold nothing that differs
between processes: no addresses of objects, no wall time, no order of a set. Notes are for people and aren't hashed. Lines are
kept as records and hashed in batches, column by column: text is made only of those that somebody reads.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable
from hashlib import blake2b
from struct import pack

DIGEST_BYTES = 16
BATCH_LINES = 512
"""Lines that are hashed at once: one call instead of many."""
LINES_PER_STORY = 40
TALK = ("data", "fin", "dial", "open", "accept", "refused", "broken", "end")
"""What every host does all the time: of these a story has fewer lines, so that they don't drown the others."""
TALK_PER_STORY = 12
OF_THE_RUN = ("fault", "run")
"""What befalls hosts, and what ends the run: of these the last are the story of the whole run."""
SESSIONS_AT_MOST = 4096
"""Sessions whose stories are kept; the one that was silent for longest is forgotten first."""
NOTE_CHARACTERS = 400

NO_BYTES = -1
"""The count of a line that isn't about bytes."""

Record = tuple[float, str, str, str, int, int]
"""Seconds, kind, host, text; and of bytes that arrived how many there were, and their checksum."""

_OBJECT_ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class Trace:
    """``now`` gives virtual seconds. Every line has a kind (one word), a host and a text without line ends."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start_s = now()
        self._hash = blake2b(digest_size=DIGEST_BYTES)
        self._batch: list[Record] = []
        self._hosts: dict[str, deque[Record]] = {}
        self._talk: dict[str, deque[Record]] = {}
        self._sessions: OrderedDict[str, deque[Record]] = OrderedDict()
        self._run: deque[Record] = deque(maxlen=LINES_PER_STORY)
        self._lines = 0
        self._is_closed = False
        self.listener: Callable[[str], None] | None = None
        """Hears every line and note as it comes; for ``--verbose``."""

    @property
    def lines(self) -> int:
        """Lines so far."""
        return self._lines + len(self._batch)

    def add(self, kind: str, host: str, text: str, session: str = "") -> None:
        """One event, hashed, and remembered for ``host`` and (where one is named) ``session``."""
        if self._is_closed:
            return
        record = (self._now(), kind, host, text, NO_BYTES, 0)
        self._batch.append(record)
        if len(self._batch) >= BATCH_LINES:
            self._flush()
        rings, length = (self._talk, TALK_PER_STORY) if kind in TALK else (self._hosts, LINES_PER_STORY)
        ring = rings.get(host)
        if ring is None:
            ring = rings[host] = deque(maxlen=length)
        ring.append(record)
        if kind in OF_THE_RUN:
            self._run.append(record)
        if session:
            self._remember_session(session, record)
        if self.listener is not None:
            self.listener(_line(record))

    def data(self, host: str, source: str, count: int, checksum: int) -> None:
        """Bytes from ``source`` arrived: as `add` with the kind "data", which most lines have."""
        if self._is_closed:
            return
        record = (self._now(), "data", host, source, count, checksum)
        batch = self._batch
        batch.append(record)
        if len(batch) >= BATCH_LINES:
            self._flush()
        ring = self._talk.get(host)
        if ring is None:
            ring = self._talk[host] = deque(maxlen=TALK_PER_STORY)
        ring.append(record)
        if self.listener is not None:
            self.listener(_line(record))

    def note(self, host: str, text: str, session: str = "", *, of_the_run: bool = False) -> None:
        """Remembered for the story, never hashed: what a log line or an exception says."""
        if self._is_closed:
            return
        flat = _OBJECT_ADDRESS.sub("0x...", " | ".join(text.splitlines()))[:NOTE_CHARACTERS]
        record = (self._now(), "note", host, flat, NO_BYTES, 0)
        self._hosts.setdefault(host, deque(maxlen=LINES_PER_STORY)).append(record)
        if of_the_run or not host:
            self._run.append(record)
        if session:
            self._remember_session(session, record)
        if self.listener is not None:
            self.listener(_line(record))

    def story(self, name: str) -> tuple[str, ...]:
        """The last lines of a session or a host, oldest first, with the seconds since the start; empty when nothing is known of it.

        That of nobody ("") is the run's own: what befell hosts last, failures, how it ended.
        """
        records = list(self._sessions.get(name, ()) if name else self._run)
        if not records:
            records = [*self._hosts.get(name, ()), *self._talk.get(name, ())]
            records.sort(key=lambda record: record[0])
        return tuple(f"{record[0] - self._start_s:12.6f}  {_words(record)}" for record in records)

    def hexdigest(self) -> str:
        """Of every line so far; the trace may go on."""
        asked = self._hash.copy()
        asked.update(_packed(self._batch))
        return asked.hexdigest()

    def close(self) -> None:
        """The run is over: what is still said while it is taken down isn't heard."""
        self._is_closed = True

    def _remember_session(self, session: str, record: Record) -> None:
        ring = self._sessions.get(session)
        if ring is None:
            ring = self._sessions[session] = deque(maxlen=LINES_PER_STORY)
            if len(self._sessions) > SESSIONS_AT_MOST:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(session)
        ring.append(record)

    def _flush(self) -> None:
        self._lines += len(self._batch)
        self._hash.update(_packed(self._batch))
        self._batch.clear()


def _packed(batch: list[Record]) -> bytes:
    """What is hashed of some lines: all of it, column by column."""
    if not batch:
        return b""
    times, kinds, hosts, texts, counts, checksums = zip(*batch, strict=True)
    lines = len(batch)
    words = "\n".join((*kinds, *hosts, *texts, ""))
    return pack(f"<{lines}d{2 * lines}q", *times, *counts, *checksums) + words.encode()


def _words(record: Record) -> str:
    _, kind, host, text, count, checksum = record
    return f"{kind} {host} {text}" if count == NO_BYTES else f"{kind} {host} {text} {count} {checksum:08x}"


def _line(record: Record) -> str:
    return f"{record[0]!r} {_words(record)}"
