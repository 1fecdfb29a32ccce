"""What servers say of themselves in the DHT: one record per server and model. Pure.

Owns the record's fields, their bounds and keys (DESIGN 7). The DHT proves who published a record; whether it names its publisher
is checked here by the reader, who knows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import msgpack

from routing.errors import BadRecord
from routing.types import MODEL_ID_BYTES, ComputeClass, ModelId, Span

BLOCKS_PER_GROUP = 16
"""Who drives or places itself reads all groups of a model, each from a few holders that tell what is new: few groups cost little."""
BLOCKS_MAX = 4096
RECORD_BYTES_MAX = 8192
RECORDS_CACHED = 4096
"""Values whose record is remembered: a renewal carries the same bytes."""
CACHED_BYTES_MAX = 2048
"""A server with all its neighbours takes about 1 KiB; what is larger is decoded each time."""
ADDRESSES_MAX = 16
ADDRESS_CHARS_MAX = 256
NAME_CHARS_MAX = 128
NEIGHBOURS_MAX = 16
ADAPTERS_MAX = 16
SECONDS_MAX = 1e6
MANIFESTS_KEY = hashlib.sha256(b"peerd/models/1").digest()


class State(Enum):
    """A server's life with one model."""

    JOINING = "joining"
    ONLINE = "online"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One server's claim on one span of one model.

    Attributes:
        step_s: measured seconds of one token through one block.
        prefill_s: measured seconds of one token of a long window through one block.
        queue_s: how long a window waits now.
        free_tokens: session tokens that fit into the KV memory left; None while nobody knows.
        neighbour_rtts: (peer, seconds) of measured round trips.
    """

    peer: bytes
    addresses: tuple[str, ...]
    model: ModelId
    span: Span
    state: State
    compute_class: ComputeClass
    step_s: float = 0.0
    prefill_s: float = 0.0
    queue_s: float = 0.0
    free_tokens: int | None = None
    neighbour_rtts: tuple[tuple[bytes, float], ...] = ()
    adapters: tuple[str, ...] = ()
    version: str = ""

    def encode(self) -> bytes:
        """At most `RECORD_BYTES_MAX` bytes of msgpack."""
        fields: dict[str, Any] = {
            "p": self.peer,
            "a": list(self.addresses[:ADDRESSES_MAX]),
            "m": bytes(self.model),
            "s": [self.span.start, self.span.end],
            "st": self.state.value,
            "cc": str(self.compute_class),
            "t": self.step_s,
            "tp": self.prefill_s,
            "q": self.queue_s,
            "kv": self.free_tokens,
            "n": [[peer, rtt] for peer, rtt in self.neighbour_rtts[:NEIGHBOURS_MAX]],
            "ad": list(self.adapters[:ADAPTERS_MAX]),
            "v": self.version,
        }
        packed: bytes = msgpack.packb(fields)
        return packed


def decode_record(data: bytes) -> SpanRecord:
    """Read strictly. Raises BadRecord, whatever came."""
    if len(data) > RECORD_BYTES_MAX:
        raise BadRecord("A server's record is too large.")
    return _decode_known(data) if len(data) <= CACHED_BYTES_MAX else _decode(data)


def _decode(data: bytes) -> SpanRecord:
    try:
        fields = msgpack.unpackb(data, max_ext_len=0, max_array_len=64, max_map_len=64)
        return _read(fields)
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise BadRecord("A server's record is malformed; it may run another version.") from error


_decode_known = lru_cache(RECORDS_CACHED)(_decode)
"""Records are immutable, so they may be shared; an error is never remembered."""


def _read(fields: dict[str, Any]) -> SpanRecord:
    start, end = fields["s"]
    model, peer = fields["m"], fields["p"]
    if type(start) is not int or type(end) is not int or end > BLOCKS_MAX:
        raise ValueError("span")
    if not isinstance(model, bytes) or len(model) != MODEL_ID_BYTES or not isinstance(peer, bytes) or len(peer) > 64:
        raise ValueError("ids")
    return SpanRecord(
        peer=peer,
        addresses=_texts(fields["a"], ADDRESSES_MAX, ADDRESS_CHARS_MAX),
        model=ModelId(model),
        span=Span(start, end),
        state=State(fields["st"]),
        compute_class=ComputeClass.parse(_text(fields["cc"], NAME_CHARS_MAX)),
        step_s=_seconds(fields["t"]),
        prefill_s=_seconds(fields["tp"]),
        queue_s=_seconds(fields["q"]),
        free_tokens=None if fields["kv"] is None else _count(fields["kv"]),
        neighbour_rtts=tuple(_rtt(entry) for entry in fields["n"][:NEIGHBOURS_MAX]),
        adapters=_texts(fields["ad"], ADAPTERS_MAX, NAME_CHARS_MAX),
        version=_text(fields["v"], NAME_CHARS_MAX),
    )


def _text(value: object, limit: int) -> str:
    if not isinstance(value, str) or len(value) > limit or not value.isprintable():
        raise ValueError("text")
    return value


def _texts(value: object, count: int, limit: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > count:
        raise ValueError("texts")
    return tuple(_text(entry, limit) for entry in value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_MAX:
        raise ValueError("seconds")
    return float(value)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("count")
    return value


def _rtt(entry: object) -> tuple[bytes, float]:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], bytes) or len(entry[0]) > 64:
        raise ValueError("rtt")
    return entry[0], _seconds(entry[1])


def span_keys(model: ModelId, span: Span) -> tuple[bytes, ...]:
    """The DHT keys that a span's record is published under: one for each group of blocks that it touches."""
    groups = range(span.start // BLOCKS_PER_GROUP, (span.end - 1) // BLOCKS_PER_GROUP + 1)
    return tuple(hashlib.sha256(b"peerd/span/2" + model + group.to_bytes(4, "big")).digest() for group in groups)
