"""Servers to plan with."""

from __future__ import annotations

from routing.records import SpanRecord, State
from routing.types import ComputeClass, ModelId, Span

MODEL = ModelId(b"m" * 32)
FLOAT32 = ComputeClass("none", "float32")


def server(name: str, span: str, *, state: State = State.ONLINE, step_s: float = 0.001, **fields: object) -> SpanRecord:
    start, end = span.split(":")
    return SpanRecord(
        name.encode(),
        (),
        MODEL,
        Span(int(start), int(end)),
        state,
        FLOAT32,
        step_s=step_s,
        **fields,  # type: ignore[arg-type]
    )
