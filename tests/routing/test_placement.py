"""Where newcomers go: swarms that fill up one by one, without herds or gaps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from routing.catalog import ModelView
from routing.placement import choose_span, settle_claim
from routing.records import SpanRecord, State
from routing.types import Span
from tests.routing.servers import FLOAT32, MODEL, server


def grow(sizes: list[int], blocks: int) -> ModelView:
    servers: list[SpanRecord] = []
    for index, size in enumerate(sizes):
        seen = ModelView(MODEL, blocks, tuple(servers))
        span = choose_span(seen, size, FLOAT32)
        servers.append(server(f"s{index:02}", str(span), state=State.JOINING if index % 2 else State.ONLINE))
    return ModelView(MODEL, blocks, tuple(servers))


def test_who_can_hold_everything_takes_everything() -> None:
    assert choose_span(ModelView(MODEL, 12, ()), 100, FLOAT32) == Span(0, 12)


def test_newcomers_fill_the_gap_first() -> None:
    seen = ModelView(MODEL, 12, (server("a", "0:4"), server("b", "8:12")))
    assert choose_span(seen, 4, FLOAT32) == Span(4, 8)


def test_claims_of_servers_that_still_load_count() -> None:
    seen = ModelView(MODEL, 8, (server("a", "0:4", state=State.JOINING),))
    assert choose_span(seen, 4, FLOAT32) == Span(4, 8)


def test_who_is_leaving_does_not_count() -> None:
    seen = ModelView(MODEL, 8, (server("a", "0:4", state=State.DRAINING), server("b", "4:8")))
    assert choose_span(seen, 4, FLOAT32) == Span(0, 4)


def test_a_weak_server_is_helped_before_a_strong_one() -> None:
    seen = ModelView(MODEL, 8, (server("strong", "0:4", step_s=0.001), server("weak", "4:8", step_s=0.1)))
    assert choose_span(seen, 4, FLOAT32) == Span(4, 8)


@given(st.lists(st.integers(2, 6), min_size=12, max_size=16))
@settings(max_examples=40)
def test_servers_that_join_one_by_one_leave_no_gap(sizes: list[int]) -> None:
    assert min(grow(sizes, 12).replicas(State.ONLINE, State.JOINING)) >= 1


def test_equal_servers_end_up_evenly_spread() -> None:
    replicas = grow([4] * 9, 12).replicas(State.ONLINE, State.JOINING)
    assert set(replicas) == {3}


def test_a_claim_seen_before_ours_stands_whatever_its_peer_id() -> None:
    first, ours = server("z", "0:8", state=State.JOINING), server("a", "0:4", state=State.JOINING)
    seen = ModelView(MODEL, 12, (ours, first))
    assert settle_claim(seen, (first.peer,), ours.peer, 4, FLOAT32) == Span(8, 12)


def test_claims_of_one_moment_spread_over_the_gaps() -> None:
    """Each saw an empty model and claimed its start; each settles by itself, from the same view."""
    claims = tuple(server(name, "0:4", state=State.JOINING) for name in "abc")
    seen = ModelView(MODEL, 12, claims)
    assert [settle_claim(seen, (), claim.peer, 4, FLOAT32) for claim in claims] == [Span(0, 4), Span(4, 8), Span(8, 12)]
