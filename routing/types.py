"""The nouns of routing: spans, model ids, compute classes, hops and routes.

Pure values that every layer may hold. Imports nothing of ours; knows neither peers' connections nor tensors.
Peers appear as the raw bytes of their libp2p peer id and addresses as multiaddr text, so that this module
stays below the overlay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

ModelId = NewType("ModelId", bytes)
"""32 bytes: SHA-256 over a model's canonical config and its safetensors files (DESIGN 7)."""

MODEL_ID_BYTES = 32


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Half-open range ``[start, end)`` of blocks of one model."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span needs 0 <= start < end, not {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read ``a:b``; raises ValueError on anything else."""
        start, separator, end = text.partition(":")
        if not separator or not start.isdecimal() or not end.isdecimal():
            raise ValueError(f"a span is written start:end, for instance 0:4, not {text!r}")
        return cls(int(start), int(end))

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def covers(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"


@dataclass(frozen=True, slots=True, order=True)
class ComputeClass:
    """What must be equal for two servers' outputs to be comparable: arithmetic, never the device."""

    quant: str
    dtype: str
    attention: str = "sdpa"
    numerics: int = 1

    @classmethod
    def parse(cls, text: str) -> ComputeClass:
        """Read ``quant/dtype/attention/numerics``, for instance ``none/float32/sdpa/1``."""
        fields = text.split("/")
        if len(fields) != 4 or not fields[3].isdecimal():
            raise ValueError(f"a compute class is quant/dtype/attention/numerics, not {text!r}")
        return cls(fields[0], fields[1], fields[2], int(fields[3]))

    def __str__(self) -> str:
        return f"{self.quant}/{self.dtype}/{self.attention}/{self.numerics}"


@dataclass(frozen=True, slots=True)
class Hop:
    """One (peer, span) used by one session.

    The span is the part of the peer's span that this session uses: a server may be entered and left midway.
    """

    peer: bytes
    addresses: tuple[str, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Route:
    """Ordered hops that cover every block of a model once, or of a part of it."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise ValueError("a route needs at least one hop")
        for before, after in zip(self.hops, self.hops[1:], strict=False):
            if before.span.end != after.span.start:
                raise ValueError(f"a route has no gaps: {before.span} is followed by {after.span}")

    @property
    def blocks(self) -> int:
        """How many blocks the route covers."""
        return self.hops[-1].span.end - self.hops[0].span.start

    def __len__(self) -> int:
        return len(self.hops)
