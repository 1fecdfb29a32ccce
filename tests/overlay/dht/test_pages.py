"""What a holder tells of a key, page by page, and what its cursors mean."""

from __future__ import annotations

import pytest

from overlay.dht import limits
from overlay.dht.pages import Cursor, Entry, Page, lacks, last_page, page_after, read_cursor
from overlay.dht.records import Record
from tests.overlay.dht.test_records import KEY, sealed
from tests.overlay.network import identity

LIFE, OTHER_LIFE = b"l" * limits.LIFE_BYTES, b"o" * limits.LIFE_BYTES
BEGINNING = Cursor(LIFE)


def entries(count: int, first: int = 1, value_bytes: int = 1, left_s: float = 60.0) -> list[Entry]:
    """So many records, with the serials from ``first`` on; nobody here looks at their signatures."""
    value, publisher = bytes(value_bytes), identity(1).peer_id
    return [
        Entry(
            Record(KEY, publisher, serial.to_bytes(4, "big"), 1, 60, value, bytes(4) + serial.to_bytes(4, "big")),
            serial,
            left_s,
        )
        for serial in range(first, first + count)
    ]


def serials(page: Page) -> list[int]:
    return [int.from_bytes(record.subkey, "big") for record in page.records]


def pages_of(published: list[Entry], stored: list[Entry]) -> list[Page]:
    """All pages, as one who asks until there is no more gets them."""
    since, pages = BEGINNING, list[Page]()
    while not pages or pages[-1].more:
        newer = [entry for entry in published if entry.serial > since.published]
        pages.append(page_after(since, newer, [entry for entry in stored if entry.serial > since.stored]))
        since = read_cursor(pages[-1].cursor.encode(), LIFE)
    return pages


def test_a_cursor_comes_back_as_it_was_given_to_the_holder_that_gave_it() -> None:
    cursor = Cursor(LIFE, 7, 2**63)
    assert read_cursor(cursor.encode(), LIFE) == cursor
    assert len(cursor.encode()) <= limits.CURSOR_BYTES_MAX


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        LIFE,
        Cursor(LIFE, 7, 9).encode()[:-1],
        Cursor(LIFE, 7, 9).encode() + b"\0",
        bytes(1000),
        Cursor(OTHER_LIFE, 7, 9).encode(),
    ],
    ids=["none", "short", "life alone", "cut", "longer", "huge", "of another life"],
)
def test_a_cursor_that_means_nothing_here_is_the_beginning(data: bytes) -> None:
    assert read_cursor(data, LIFE) == BEGINNING


def test_what_fits_comes_in_one_page_publications_first_each_the_oldest_first() -> None:
    page = page_after(BEGINNING, entries(2, first=5), entries(3, first=1))
    assert serials(page) == [5, 6, 1, 2, 3]
    assert page.cursor == Cursor(LIFE, published=6, stored=3)
    assert not page.more


def test_where_nothing_is_new_the_cursor_stays() -> None:
    since = Cursor(LIFE, 4, 5)
    assert page_after(since, [], []) == Page((), (), since, more=False)


def test_publications_and_what_is_held_advance_each_by_itself() -> None:
    since = Cursor(LIFE, 4, 5)
    assert page_after(since, entries(1, first=9), []).cursor == Cursor(LIFE, 9, 5)
    assert page_after(since, [], entries(1, first=9)).cursor == Cursor(LIFE, 4, 9)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_page_holds_so_many_records_and_says_whether_more_follow(beyond: int) -> None:
    page = page_after(BEGINNING, [], entries(limits.PAGE_RECORDS + beyond))
    assert serials(page) == list(range(1, limits.PAGE_RECORDS + 1))
    assert page.cursor == Cursor(LIFE, 0, limits.PAGE_RECORDS)
    assert page.more is bool(beyond)


def test_a_page_holds_so_many_bytes() -> None:
    (one,) = entries(1, value_bytes=limits.VALUE_BYTES_MAX)
    fitting = limits.PAGE_BYTES // one.record.size_bytes
    page = page_after(BEGINNING, [], entries(fitting + 1, value_bytes=limits.VALUE_BYTES_MAX))
    assert len(page.records) == fitting < limits.PAGE_RECORDS
    assert page.more
    assert not page_after(BEGINNING, [], entries(fitting, value_bytes=limits.VALUE_BYTES_MAX)).more


def test_a_page_that_would_be_empty_holds_one_record_however_large() -> None:
    page = page_after(BEGINNING, [], entries(2, value_bytes=limits.PAGE_BYTES + 1))
    assert serials(page) == [1]
    assert page.more


def test_page_by_page_all_come_once_and_in_order() -> None:
    published, stored = entries(300, first=1000), entries(400)
    pages = pages_of(published, stored)
    assert [serial for page in pages for serial in serials(page)] == [*range(1000, 1300), *range(1, 401)]
    assert [len(page.records) for page in pages] == [256, 256, 188]


def test_a_page_that_ends_among_the_publications_leaves_what_is_held_for_the_next() -> None:
    page = page_after(Cursor(LIFE, 0, 0), entries(limits.PAGE_RECORDS), entries(1))
    assert page.cursor == Cursor(LIFE, limits.PAGE_RECORDS, 0)
    assert page.more


def fingerprints(found: list[Entry]) -> list[bytes]:
    return [entry.record.fingerprint for entry in found]


def test_of_what_an_asker_knows_it_is_told_nothing_and_the_cursor_passes_it() -> None:
    published, stored = entries(2, first=10), entries(4)
    page = page_after(BEGINNING, published, stored, fingerprints(published[1:] + stored[2:]))
    assert serials(page) == [10, 1, 2]
    assert (page.cursor, page.more) == (Cursor(LIFE, 11, 4), False)
    page = page_after(BEGINNING, published, stored, fingerprints(published + stored))
    assert (page.records, page.cursor) == ((), Cursor(LIFE, 11, 4))


def test_what_is_known_takes_no_room_in_a_page_and_nothing_that_is_not_is_passed_over() -> None:
    stored = entries(2 * limits.PAGE_RECORDS + 20)
    known = fingerprints(stored[::2])
    page = page_after(BEGINNING, [], stored, known)
    assert serials(page) == list(range(2, 2 * limits.PAGE_RECORDS + 1, 2))
    assert (page.cursor, page.more) == (Cursor(LIFE, 0, 2 * limits.PAGE_RECORDS), True)
    rest = page_after(page.cursor, [], stored[2 * limits.PAGE_RECORDS :], known)
    assert serials(rest) == list(range(2 * limits.PAGE_RECORDS + 2, 2 * limits.PAGE_RECORDS + 21, 2))
    assert not rest.more


def test_a_page_that_ends_among_publications_passes_nothing_that_is_held_also_where_much_is_known() -> None:
    published, stored = entries(limits.PAGE_RECORDS + 2, first=1000), entries(3)
    page = page_after(BEGINNING, published, stored, fingerprints(published[:1] + stored[:2]))
    assert serials(page) == list(range(1001, 1001 + limits.PAGE_RECORDS))
    assert (page.cursor, page.more) == (Cursor(LIFE, 1000 + limits.PAGE_RECORDS, 0), True)


def test_a_page_that_ends_among_what_is_held_says_where_also_where_publications_are_known() -> None:
    published, stored = entries(3, first=1000), entries(limits.PAGE_RECORDS + 5)
    page = page_after(BEGINNING, published, stored, fingerprints(published[1:]))
    assert serials(page) == [1000, *range(1, limits.PAGE_RECORDS)]
    assert (page.cursor, page.more) == (Cursor(LIFE, 1000, limits.PAGE_RECORDS - 1), True)


def test_of_what_an_asker_knows_the_first_few_that_a_holder_lacks_are_named_by_their_places() -> None:
    known = entries(6)
    held = fingerprints([known[0], known[3], *entries(2, first=100)])
    assert lacks(fingerprints(known), held) == (1, 2, 4, 5)
    assert lacks(fingerprints(known), held, fingerprints(known[4:5])) == (1, 2, 5)
    assert lacks(fingerprints(known)) == (0, 1, 2, 3, 4, 5)
    assert lacks([], held) == ()
    assert len(lacks(fingerprints(entries(100)), [])) == limits.LACKS_TOLD_MAX


def test_another_version_of_a_record_is_another_record() -> None:
    former, latter = sealed(sequence=1), sealed(sequence=2)
    assert former.fingerprint != latter.fingerprint
    assert page_after(BEGINNING, [], [Entry(latter, 1, 60.0)], [former.fingerprint]).records == (latter,)
    assert lacks([former.fingerprint], [latter.fingerprint]) == (0,)


def test_who_knows_no_pages_gets_the_newest_and_is_told_of_no_more() -> None:
    page = last_page(BEGINNING, entries(1, first=1000), entries(limits.PAGE_RECORDS + 10))
    assert serials(page)[:3] == [1000, limits.PAGE_RECORDS + 10, limits.PAGE_RECORDS + 9]
    assert len(page.records) == limits.PAGE_RECORDS
    assert not page.more


def test_of_pages_past_their_bytes_who_knows_none_gets_the_newest() -> None:
    page = last_page(BEGINNING, [], entries(50, value_bytes=limits.VALUE_BYTES_MAX))
    assert serials(page)[0] == 50
    assert 1 <= len(page.records) < 50


@pytest.mark.parametrize(
    ("left_s", "told"), [(0.001, 1), (0.0, 1), (-3.0, 1), (1.0, 1), (1.5, 2), (29.0001, 30), (30.0, 30), (99.0, 60)]
)
def test_the_life_that_a_record_has_left_is_rounded_up_and_never_more_than_it_was_given(
    left_s: float, told: int
) -> None:
    for page in (page_after, last_page):
        (life,) = page(BEGINNING, [], [Entry(sealed(ttl_s=60), 1, left_s)]).left_s
        assert (life, type(life)) == (told, int)
