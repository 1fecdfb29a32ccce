"""Spans, classes and routes: what they read and what they refuse."""

from __future__ import annotations

import pytest

from routing.types import ComputeClass, Hop, Route, Span


def test_spans_read_what_they_print() -> None:
    assert str(Span.parse("3:7")) == "3:7"
    assert len(Span(3, 7)) == 4
    assert 3 in Span(3, 7)
    assert 7 not in Span(3, 7)
    assert Span(0, 8).covers(Span(3, 7))
    assert not Span(3, 7).covers(Span(0, 8))


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "7:3", "3:3", "a:b", "-1:3", "1:2:3"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Span.parse(text)


def test_compute_classes_read_what_they_print() -> None:
    assert ComputeClass.parse(str(ComputeClass("nf4", "bfloat16", "eager", 2))) == ComputeClass(
        "nf4", "bfloat16", "eager", 2
    )
    with pytest.raises(ValueError):
        ComputeClass.parse("none/float32")


@pytest.mark.parametrize("spans", [[], [(0, 4), (5, 8)], [(0, 4), (3, 8)]])
def test_a_route_has_neither_gaps_nor_overlaps(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError):
        Route(tuple(Hop(b"p", (), Span(*span)) for span in spans))
