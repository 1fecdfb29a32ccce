"""The index of live records: whose word counts, what is covered, and who needs help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from routing.catalog import MISSES_TO_FORGET, Catalog, ModelView, Sighting, neediest, runs
from routing.records import SpanRecord, State
from routing.types import ModelId, Span
from tests.routing.servers import MODEL, server


def view(*servers: object, blocks: int = 8) -> ModelView:
    return ModelView(MODEL, blocks, tuple(servers))  # type: ignore[arg-type]


def seen(record: SpanRecord, sequence: int = 1, publisher: bytes | None = None) -> Sighting:
    return Sighting(publisher or record.peer, sequence, 60.0, record.encode())


def test_a_record_counts_only_from_its_own_publisher() -> None:
    catalog = Catalog()
    honest, forged = server("a", "0:4"), server("b", "4:8")
    refused = catalog.replace(
        MODEL, [seen(honest), seen(forged, publisher=b"mallory"), Sighting(b"c", 1, 60.0, b"junk")], 0.0
    )
    assert refused == 2
    assert catalog.view(MODEL, 8, 1.0).servers == (honest,)


def test_a_record_is_over_when_its_time_is() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4"))], 0.0)
    assert catalog.view(MODEL, 8, 59.0).servers
    assert not catalog.view(MODEL, 8, 60.0).servers


def test_a_span_past_the_models_end_is_left_out() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:40"))], 0.0)
    assert not catalog.view(MODEL, 8, 1.0).servers


def test_reading_a_record_again_does_not_make_it_younger() -> None:
    catalog = Catalog()
    for now in (0.0, 30.0, 59.0):
        catalog.replace(MODEL, [seen(server("a", "0:4"))], now)
    assert not catalog.view(MODEL, 8, 60.0).servers
    catalog.replace(MODEL, [seen(server("a", "0:4"), sequence=2)], 60.0)
    assert catalog.view(MODEL, 8, 119.0).servers


def test_the_newest_of_several_copies_counts_and_an_old_one_never_comes_back() -> None:
    catalog = Catalog()
    old, new = server("a", "0:4"), server("a", "4:8")
    for copies in ([seen(new, 7), seen(old, 3)], [seen(old, 3), seen(new, 7)], [seen(old, 3)]):
        catalog.replace(MODEL, copies, 0.0)
        assert catalog.view(MODEL, 8, 1.0).servers == (new,)


def test_one_lookup_that_misses_a_record_opens_no_gap_but_several_do() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4"))], 0.0)
    for _ in range(MISSES_TO_FORGET - 1):
        catalog.replace(MODEL, [], 1.0)
        assert catalog.view(MODEL, 8, 2.0).servers
    catalog.replace(MODEL, [], 1.0)
    assert not catalog.view(MODEL, 8, 2.0).servers


def test_a_model_that_nobody_announces_is_forgotten_but_not_our_own_part() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4"))], 0.0)
    catalog.put_own(server("me", "4:8"))
    catalog.forget_others_than([])
    assert [found.peer for found in catalog.view(MODEL, 8, 1.0).servers] == [b"me"]


def test_our_own_record_counts_at_once_and_goes_at_once() -> None:
    catalog = Catalog()
    catalog.put_own(server("me", "0:8"))
    assert catalog.view(MODEL, 8, 1.0).replicas() == (1,) * 8
    catalog.replace(MODEL, [seen(server("me", "0:4", state=State.JOINING))], 0.0)
    assert catalog.view(MODEL, 8, 1.0).replicas() == (1,) * 8, "an old copy from the DHT changes nothing"
    catalog.remove_own(MODEL)
    assert not catalog.view(MODEL, 8, 1.0).servers


def test_a_server_that_hung_up_is_forgotten_by_the_first_lookup_that_misses_it() -> None:
    catalog = Catalog()
    both = [seen(server("stays", "0:4")), seen(server("leaves", "4:8"))]
    catalog.replace(MODEL, both, 0.0)
    assert not catalog.doubt(b"stranger")
    assert catalog.doubt(b"leaves")
    assert catalog.view(MODEL, 8, 1.0).replicas() == (1,) * 8, "only a lookup tells"
    catalog.replace(MODEL, both, 1.0)
    catalog.replace(MODEL, both[:1], 2.0)
    assert catalog.view(MODEL, 8, 2.0).replicas() == (1,) * 8, "it was seen since: that counts from the start again"
    assert catalog.doubt(b"leaves")
    catalog.replace(MODEL, both[:1], 3.0)
    assert catalog.view(MODEL, 8, 3.0).replicas() == (1,) * 4 + (0,) * 4


def test_a_view_is_the_same_one_until_something_of_its_model_changes() -> None:
    catalog = Catalog()
    other = ModelId(b"n" * 32)
    own, theirs = server("me", "4:8"), server("a", "0:4")
    changes: list[Callable[[], object]] = [
        lambda: catalog.replace(MODEL, [seen(theirs)], 0.0),
        lambda: catalog.put_own(own),
        lambda: catalog.replace(MODEL, [seen(replace(theirs, queue_s=1.0), 2)], 1.0),
        lambda: catalog.remove_own(MODEL),
        lambda: catalog.forget_others_than([]),
    ]
    expected = [["a"], ["a", "me"], ["a", "me"], ["a"], []]
    before = catalog.view(MODEL, 8, 1.0)
    for change, names in zip(changes, expected, strict=True):
        change()
        now = catalog.view(MODEL, 8, 1.0)
        assert now != before
        assert [found.peer.decode() for found in now.servers] == names
        catalog.put_own(replace(own, model=other))
        catalog.doubt(b"a")
        if names:
            catalog.forget_others_than([MODEL])
            assert catalog.view(MODEL, 8, 1.0) is now
        before = now


def test_a_look_that_brings_nothing_new_leaves_the_view_as_it_is() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4")), seen(server("b", "4:8"))], 0.0)
    before = catalog.view(MODEL, 8, 1.0)
    entries = dict(catalog._entries[MODEL])
    catalog.replace(MODEL, [seen(server("b", "4:8")), seen(server("a", "0:4"))], 2.0)
    assert catalog.view(MODEL, 8, 2.0) is before
    assert all(catalog._entries[MODEL][peer] is entry for peer, entry in entries.items())


def test_a_view_ends_with_the_first_record_of_it() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4"))], 0.0)
    catalog.replace(MODEL, [seen(server("a", "0:4")), seen(server("b", "4:8"))], 30.0)
    both = catalog.view(MODEL, 8, 31.0)
    assert catalog.view(MODEL, 8, 59.0) is both
    assert [found.peer for found in catalog.view(MODEL, 8, 60.0).servers] == [b"b"]
    assert catalog.view(MODEL, 8, 59.0).servers == both.servers, "asked for an earlier moment"
    assert not catalog.view(MODEL, 8, 90.0).servers


def test_a_view_of_other_blocks_is_another() -> None:
    catalog = Catalog()
    catalog.replace(MODEL, [seen(server("a", "0:4")), seen(server("b", "4:8"))], 0.0)
    assert [len(catalog.view(MODEL, blocks, 1.0).servers) for blocks in (8, 4, 8)] == [2, 1, 2]


def test_views_of_models_that_nobody_knows_are_not_kept() -> None:
    catalog = Catalog()
    for number in range(3):
        assert not catalog.view(ModelId(bytes([number]) * 32), 8, 1.0).servers
    catalog.put_own(server("me", "4:8"))
    catalog.view(MODEL, 8, 1.0)
    assert list(catalog._snapshots) == [MODEL]


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
