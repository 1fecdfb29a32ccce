"""The index of live records: whose word counts, what is covered, and who needs help."""

from __future__ import annotations

from routing.catalog import Catalog, ModelView, neediest, runs
from routing.records import State
from routing.types import ModelId, Span
from tests.routing.servers import MODEL, server


def view(*servers: object, blocks: int = 8) -> ModelView:
    return ModelView(MODEL, blocks, tuple(servers))  # type: ignore[arg-type]


def test_a_record_counts_only_from_its_own_publisher() -> None:
    catalog = Catalog()
    honest, forged = server("a", "0:4"), server("b", "4:8")
    refused = catalog.replace(
        MODEL, [(b"a", honest.encode(), 60), (b"mallory", forged.encode(), 60), (b"c", b"junk", 60)], 0.0
    )
    assert refused == 2
    assert catalog.view(MODEL, 8, 1.0).servers == (honest,)


def test_a_record_is_over_when_its_time_is() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [(b"a", server("a", "0:4").encode(), 60)], 0.0)
    assert catalog.view(MODEL, 8, 59.0).servers
    assert not catalog.view(MODEL, 8, 60.0).servers


def test_a_span_past_the_models_end_is_left_out() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [(b"a", server("a", "0:40").encode(), 60)], 0.0)
    assert not catalog.view(MODEL, 8, 1.0).servers


def test_our_own_record_counts_at_once_and_goes_at_once() -> None:
    catalog = Catalog()
    catalog.put(server("me", "0:8"), float("inf"))
    assert catalog.view(MODEL, 8, 1.0).replicas() == (1,) * 8
    catalog.remove(MODEL, b"me")
    assert not catalog.view(MODEL, 8, 1.0).servers


def test_replicas_count_states_apart() -> None:
    seen = view(server("a", "0:4"), server("b", "2:8", state=State.JOINING))
    assert seen.replicas() == (1, 1, 1, 1, 0, 0, 0, 0)
    assert seen.replicas(State.ONLINE, State.JOINING) == (1, 1, 2, 2, 1, 1, 1, 1)
    assert seen.missing() == (Span(4, 8),)
    assert seen.missing(State.ONLINE, State.JOINING) == ()


def test_runs_are_maximal() -> None:
    assert runs((True, True, False, True)) == (Span(0, 2), Span(3, 4))
    assert runs(()) == ()


def test_the_model_with_a_gap_needs_servers_more_than_the_one_without() -> None:
    other = ModelId(b"n" * 32)
    assert neediest({MODEL: view(server("a", "0:8")), other: view(server("b", "0:4"))}) == other
    assert neediest({}) is None
