"""What backward needs of a forward: the input of every span of every micro-batch, on the driver's side. Pure.

Any server can answer any backward from it, and one that is lost costs the recomputation of one span.
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.protocol.calls import batch_rows
from blocks.protocol.device import Batch
from overlay.rpc.types import DTYPE_BYTES, Part
from routing.types import Span


@dataclass(frozen=True, slots=True)
class Section:
    """A run of blocks that one server computed, and what went in."""

    span: Span
    hidden: Part
    peer: bytes


@dataclass(frozen=True, slots=True)
class MicroTape:
    """Rows [start, stop) of a batch, and the sections that they went through, in order."""

    start: int
    stop: int
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Tape:
    """All of a forward. Holds no resource but memory: dropping it is all there is to do."""

    span: Span
    batch: Batch
    micros: tuple[MicroTape, ...]

    @property
    def size_bytes(self) -> int:
        """Host memory held."""
        batch = self.batch
        parts = [part for part in (batch.hidden, batch.mask, batch.positions, batch.prompts) if part is not None]
        kept = [section.hidden for micro in self.micros for section in micro.sections[1:]]
        return sum(part.size_bytes for part in (*parts, *kept))


def section_batch(batch: Batch, whole: Span, span: Span, hidden: Part, start: int, stop: int) -> Batch:
    """The batch that a server gets for ``span``: rows [start, stop), their state at its boundary, and the prompts of its blocks."""
    rows = batch_rows(Batch(batch.hidden, batch.mask, batch.positions), start, stop)
    return Batch(hidden, rows.mask, rows.positions, prompts_of(batch.prompts, whole, span))


def prompts_of(prompts: Part | None, whole: Span, span: Span) -> Part | None:
    """The prompts of the blocks of ``span``, out of those of ``whole``."""
    if prompts is None or span == whole:
        return prompts
    block = DTYPE_BYTES[prompts.dtype] * prompts.shape[1] * prompts.shape[2]
    first, last = span.start - whole.start, span.end - whole.start
    view = memoryview(prompts.data).cast("B")[first * block : last * block]
    return Part(prompts.name, prompts.dtype, (last - first, *prompts.shape[1:]), view)
