"""Keys that are followed: what a reader keeps of what it was told, and whom it asks for what."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from kademlia.node import Node

from netsim.loop import run
from overlay.dht import limits
from overlay.dht.following import FollowedKey, Known
from overlay.dht.lookup import Found
from overlay.dht.pages import lacks
from overlay.dht.records import Record, location_of, seal_record
from overlay.dht.table import Contact
from tests.overlay.dht.test_records import KEY, sealed
from tests.overlay.network import identity

ANSWER_S = 0.05
RPC_S = limits.RPC_TIMEOUT_MAX_S
CONTACTS = sorted(
    (Contact(identity(number).peer_id) for number in range(100, 120)),
    key=lambda contact: contact.long_id ^ int.from_bytes(location_of(KEY), "big"),
)


def told(*records: Record, left_s: float | None = None, cursor: bytes = b"cursor") -> Found:
    """An answer with these records, which have so long to live: all of their time if it isn't said."""
    return Found((), records, tuple(record.ttl_s if left_s is None else left_s for record in records), cursor)


def plain(number: int, size_bytes: int = 1, sequence: int = 1) -> Record:
    """A record that nobody signed: `Known` is told only of verified ones."""
    signature = number.to_bytes(4, "big") + sequence.to_bytes(4, "big")
    return Record(KEY, identity(1).peer_id, number.to_bytes(4, "big"), sequence, 60, bytes(size_bytes), signature)


def numbers(known: Known, now: float = 0.0) -> list[int]:
    return [int.from_bytes(record.subkey, "big") for record in known.live(now)]


# --- what is known ---


def test_a_record_lives_as_long_as_its_holder_says_that_it_has_left() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60), left_s=10.0), 100.0)
    assert known.live(109.9) == [sealed(ttl_s=60)]
    assert known.live(110.0) == []


def test_of_two_holders_the_one_that_has_it_longer_is_believed_but_not_past_its_life_from_first_sight() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60), left_s=10.0), 100.0)
    known.heard(b"b", told(sealed(ttl_s=60), left_s=20.0), 100.0)
    assert known.live(119.9) and not known.live(120.0)
    known.heard(b"c", told(sealed(ttl_s=60), left_s=60.0), 115.0)
    assert known.live(159.9) and not known.live(160.0)


def test_a_holder_that_has_it_less_long_takes_nothing_away() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60), left_s=50.0), 100.0)
    known.heard(b"b", told(sealed(ttl_s=60), left_s=1.0), 100.0)
    assert known.live(149.9)


def test_one_that_claims_more_life_than_a_record_was_given_is_not_believed() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60), left_s=9000.0), 100.0)
    assert known.live(159.9) and not known.live(160.0)


def test_what_is_over_does_not_come_back_by_being_told_again() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60)), 100.0)
    for now in (160.0, 190.0, 219.9):
        known.heard(b"b", told(sealed(ttl_s=60)), now)
        assert known.live(now) == []


def test_what_is_over_is_forgotten_after_as_long_again() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(ttl_s=60)), 100.0)
    known.live(219.9)
    assert len(known) == 1
    known.live(220.0)
    assert len(known) == 0


def test_a_newer_version_lives_anew_and_an_older_one_changes_nothing() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(sequence=2, ttl_s=60)), 100.0)
    known.heard(b"b", told(sealed(sequence=1, ttl_s=60, value=b"old")), 150.0)
    assert [record.sequence for record in known.live(159.9)] == [2]
    assert known.live(160.0) == []
    known.heard(b"a", told(sealed(sequence=3, ttl_s=60)), 170.0)
    assert [record.sequence for record in known.live(229.9)] == [3]


def test_a_withdrawal_hides_a_record_and_keeps_older_copies_out() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(sequence=1)), 0.0)
    known.heard(b"a", told(sealed(sequence=2, value=b"")), 1.0)
    known.heard(b"b", told(sealed(sequence=1)), 2.0)
    assert known.live(2.0) == []


def test_cursors_are_kept_of_holders_only() -> None:
    known, (one, other, *_) = Known(KEY), CONTACTS
    for contact in (one, other):
        known.heard(contact.id, told(cursor=contact.id[:8]), 0.0)
    known.keep_cursors_of([other, CONTACTS[5]])
    assert [known.cursor_of(contact.id) for contact in (one, other, CONTACTS[5])] == [b"", other.id[:8], b""]


def test_of_what_a_holder_lacks_that_counts_which_is_known_for_a_while_and_the_rest_is_waited_for() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(1, sequence=5)), 0.0)
    known.heard(b"a", told(sealed(2)), 5.0)
    at, lacking = limits.CORRECTED_AFTER_S, [sealed(1, sequence=5), sealed(2), sealed(3)]
    assert known.lacked(lacking, at - 0.1) == []
    assert known.lacked(lacking, at) == [sealed(1, sequence=5)]
    assert known.lacked(lacking[1:], at) == []
    assert known.lacked(lacking, at + 5.0) == [sealed(1, sequence=5), sealed(2)]
    assert known.lacked(lacking, 65.0) == [], "what is over is lacked by nobody"


def test_a_holder_is_told_a_bounded_number_of_records_at_once() -> None:
    known, many = Known(KEY), [plain(number) for number in range(50)]
    known.heard(b"a", told(*many), 0.0)
    assert len(known.lacked(many, limits.CORRECTED_AFTER_S)) == limits.CORRECTED_RECORDS_MAX


def test_what_a_holder_might_tell_again_is_what_was_heard_from_others_since_its_last_answer() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(1)), 0.0)
    known.heard(b"b", told(sealed(2)), 5.0)
    known.heard(b"b", told(sealed(3)), 8.0)
    assert known.news_for(b"a", 9.0) == [sealed(1), sealed(2), sealed(3)], (
        "in the moment of an answer others may have come"
    )
    assert known.news_for(b"b", 9.0) == [sealed(3)]
    assert known.news_for(b"stranger", 9.0) == [sealed(1), sealed(2), sealed(3)]
    known.heard(b"old", told(cursor=b""), 9.0)
    assert known.news_for(b"old", 9.0) == [sealed(1), sealed(2), sealed(3)], "one without cursors tells all each time"


def test_what_has_less_than_half_of_its_life_left_may_be_told_again_by_others() -> None:
    known = Known(KEY)
    known.heard(b"a", told(sealed(1, ttl_s=60), left_s=29.9), 0.0)
    known.heard(b"a", told(sealed(2, ttl_s=60), left_s=40.0), 0.0)
    assert known.news_for(b"b", 0.0) == [sealed(2, ttl_s=60)]
    assert known.news_for(b"b", 10.0) == [sealed(2, ttl_s=60)]
    assert known.news_for(b"b", 10.1) == []


@pytest.mark.parametrize("floods_first", [True, False])
def test_a_flood_from_one_holder_crowds_out_nothing_that_others_tell(floods_first: bool) -> None:
    known, honest = Known(KEY), range(1_000_000, 1_000_200)
    flood = [told(*(plain(number) for number in range(at, at + 1000))) for at in range(0, 10_000, 1000)]
    if floods_first:
        known.heard(b"liar", flood[0], 0.0)
    for holder in (b"a", b"b"):
        known.heard(holder, told(*(plain(number) for number in honest)), 0.0)
    for found in flood:
        known.heard(b"liar", found, 0.0)
        assert len(known) <= limits.RECORDS_PER_KEY_MAX
    assert [number for number in numbers(known) if number >= honest[0]] == list(honest)


def test_what_one_honest_holder_alone_tells_outlasts_anothers_flood() -> None:
    known = Known(KEY)
    known.heard(b"a", told(*(plain(1_000_000 + number) for number in range(100))), 0.0)
    known.heard(b"liar", told(*(plain(number) for number in range(3 * limits.RECORDS_PER_KEY_MAX))), 0.0)
    assert sum(number >= 1_000_000 for number in numbers(known)) == 100


def test_what_another_confirms_stays_though_the_flooding_holder_told_it_first() -> None:
    known, honest = Known(KEY), [plain(1_000_000 + number) for number in range(100)]
    known.heard(b"liar", told(*(plain(number) for number in range(300))), 0.0)
    known.heard(b"liar", told(*honest), 0.0)
    known.heard(b"a", told(*honest), 0.0)
    known.heard(b"liar", told(*(plain(number, limits.VALUE_BYTES_MAX, sequence=2) for number in range(300))), 0.0)
    assert 100 < len(known) < 400
    assert sum(number >= 1_000_000 for number in numbers(known)) == 100


def test_what_all_tell_is_bounded_too() -> None:
    known = Known(KEY)
    many = [plain(number) for number in range(limits.RECORDS_PER_KEY_MAX + 10)]
    for holder in (b"a", b"b"):
        for at in range(0, len(many), 500):
            known.heard(holder, told(*many[at : at + 500]), 0.0)
    assert len(known) <= limits.RECORDS_PER_KEY_MAX


def test_bytes_are_bounded_and_replaced_ones_free_theirs() -> None:
    known = Known(KEY)
    size_bytes = plain(0, limits.VALUE_BYTES_MAX).size_bytes
    fitting = limits.BYTES_PER_KEY_MAX // size_bytes
    known.heard(b"a", told(*(plain(number, limits.VALUE_BYTES_MAX) for number in range(fitting))), 0.0)
    for sequence in range(2, 5):
        known.heard(b"a", told(plain(0, limits.VALUE_BYTES_MAX, sequence)), 0.0)
    assert len(known) == fitting
    known.heard(b"a", told(plain(fitting, limits.VALUE_BYTES_MAX)), 0.0)
    assert len(known) < fitting + 1
    known.live(1000.0)
    known.heard(b"a", told(*(plain(number, limits.VALUE_BYTES_MAX) for number in range(fitting))), 1000.0)
    assert len(known) == fitting, "what was forgotten frees its bytes"


# --- whom a reader asks ---


@dataclass
class Asked:
    contact: Contact
    since: bytes
    known: int
    at: float
    ended: bool = False


class Holders:
    """Holders in virtual time: each has its records, and may be dead, slow, or of few words."""

    def __init__(self, count: int = 10, records: Sequence[Record] = ()) -> None:
        self.nearest = CONTACTS[:count]
        self.held: dict[bytes, list[Record]] = {contact.id: list(records) for contact in CONTACTS}
        self.dead: dict[bytes, None] = {}
        self.slow: dict[bytes, None] = {}
        self.left_s: dict[bytes, float] = {}
        self.own: list[Record] = []
        self.asked: list[Asked] = []
        self.looked: list[tuple[int, float]] = []
        self.corrected: list[tuple[Contact, list[Record]]] = []

    async def nearest_to(self, target: Node, wanted: int, *, fresh_s: float = limits.LOCATED_S) -> tuple[Contact, ...]:
        assert target.id == location_of(KEY)
        self.looked.append((wanted, fresh_s))
        return tuple(CONTACTS[: limits.KSIZE] if wanted > limits.LOCATED_HOLDERS else self.nearest)

    async def ask_for(self, contact: Contact, key: bytes, since: bytes, known: Sequence[bytes]) -> Found | None:
        asked = Asked(contact, since, len(known), asyncio.get_running_loop().time())
        self.asked.append(asked)
        if contact.id in self.dead:
            return None
        await asyncio.sleep(RPC_S if contact.id in self.slow else ANSWER_S)
        asked.ended = True
        held = self.held[contact.id]
        new = held[int.from_bytes(since, "big") :]
        unknown = [record for record in new if record.fingerprint not in known]
        found = told(*unknown, cursor=len(held).to_bytes(4, "big"), left_s=self.left_s.get(contact.id))
        return replace(found, lacks=() if since else lacks(known, held))

    def records_of(self, key: bytes) -> list[Record]:
        return self.own

    def correct(self, contact: Contact, records: Sequence[Record]) -> None:
        self.corrected.append((contact, list(records)))

    def names(self) -> list[int]:
        """Who was asked since the last time, by number."""
        asked, self.asked = self.asked, []
        return [CONTACTS.index(entry.contact) for entry in asked]


def following(holders: Holders, scene: Callable[[FollowedKey], Awaitable[None]], salt: bytes = b"salt") -> None:
    async def main() -> None:
        async with asyncio.timeout(3600):
            await scene(FollowedKey(KEY, holders, salt, asyncio.get_running_loop().time))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def order_of(salt: bytes) -> list[int]:
    """In which order a reader with that salt asks the nearest ten."""
    holders = Holders()
    holders.dead = dict.fromkeys(holders.held)

    async def scene(followed: FollowedKey) -> None:
        await followed.read()

    following(holders, scene, salt)
    return holders.names()


def test_a_read_asks_a_few_holders_and_the_next_one_the_same_for_what_is_new() -> None:
    holders = Holders(records=[sealed(1), sealed(2)])

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == tuple(sorted([sealed(1), sealed(2)], key=lambda record: record.name))
        assert followed.answers == limits.READ_HOLDERS
        assert {asked.since for asked in holders.asked} == {b""}
        first = holders.names()
        assert len(first) == len(set(first)) == limits.READ_HOLDERS
        for held in holders.held.values():
            held.append(sealed(3))
        assert len(await followed.read()) == 3
        assert {asked.since for asked in holders.asked} == {(2).to_bytes(4, "big")}
        assert holders.names() == first
        assert holders.looked == [(limits.LOCATED_HOLDERS, limits.LOCATED_S)] * 2

    following(holders, scene)


def test_readers_spread_over_the_holders() -> None:
    firsts = [order_of(bytes([number]))[: limits.READ_HOLDERS] for number in range(40)]
    asked = [sum(number in first for first in firsts) for number in range(10)]
    assert min(asked) > 0
    assert max(asked) < 30


def test_a_holder_that_fails_is_replaced_by_the_next() -> None:
    holders = Holders(records=[sealed()])
    order = order_of(b"salt")
    holders.dead = {CONTACTS[number].id: None for number in order[:2]}

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(),)
        assert followed.answers == limits.READ_HOLDERS
        assert sorted(holders.names()) == sorted(order[: limits.READ_HOLDERS + 2])

    following(holders, scene)


def test_a_slow_holder_costs_patience_and_not_its_timeout_and_is_let_go() -> None:
    holders = Holders(records=[sealed()])
    order = order_of(b"salt")

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        holders.slow, holders.asked = {CONTACTS[order[1]].id: None}, []
        now = asyncio.get_running_loop().time
        began = now()
        await followed.read()
        assert now() - began == pytest.approx(limits.PATIENCE_MIN_S + ANSWER_S, abs=0.01)
        assert followed.answers == limits.READ_HOLDERS
        assert [asked.ended for asked in holders.asked] == [True, False, True, True, True]
        assert holders.names() == order[: limits.READ_HOLDERS + 1]

    following(holders, scene)


def test_slow_holders_are_waited_for_where_there_are_no_others() -> None:
    holders = Holders(3, records=[sealed()])
    holders.slow = dict.fromkeys(holders.held)

    async def scene(followed: FollowedKey) -> None:
        for least in (1, 3):
            assert await followed.read() == (sealed(),)
            assert followed.answers >= least

    following(holders, scene)


def test_where_much_is_known_one_is_asked_first_and_the_others_for_what_it_did_not_tell() -> None:
    many = [sealed(number) for number in range(limits.AT_ONCE_RECORDS_MAX + 1)]
    holders = Holders(records=many[:-1])

    async def scene(followed: FollowedKey) -> None:
        for records, firsts in ((many[:-1], 1), (many[:-1], 4), (many, 4), (many, 1)):
            for held in holders.held.values():
                held[:] = records
            holders.asked.clear()
            assert len(await followed.read()) == len(records)
            began = holders.asked[0].at
            assert [asked.at - began < ANSWER_S / 2 for asked in holders.asked].count(True) == firsts
            assert len(holders.asked) == limits.READ_HOLDERS

    following(holders, scene)


def test_what_one_told_is_said_to_be_known_to_the_others_and_the_cursors_say_the_rest() -> None:
    holders = Holders(records=[sealed(1), sealed(2)])

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        assert [asked.known for asked in holders.asked] == [0, 2, 2, 2]
        await asyncio.sleep(1)
        holders.asked.clear()
        await followed.read()
        assert [asked.known for asked in holders.asked][1:] == [0, 0, 0]

    following(holders, scene)


def test_all_are_asked_before_a_key_is_said_to_have_no_records() -> None:
    holders = Holders()
    holders.held[CONTACTS[17].id].append(sealed())

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(),)
        assert holders.looked == [(limits.LOCATED_HOLDERS, limits.LOCATED_S), (limits.KSIZE, limits.LOCATED_S)]
        assert sorted(holders.names()[limits.READ_HOLDERS :]) == list(range(limits.KSIZE))

    following(holders, scene)


def test_where_nobody_answers_nothing_is_said_and_nobody_else_asked() -> None:
    holders = Holders()
    holders.dead = dict.fromkeys(holders.held)

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == ()
        assert followed.answers == 0
        assert len(holders.looked) == 1

    following(holders, scene)


def test_alone_a_reader_knows_what_it_holds_itself() -> None:
    holders = Holders(0)
    holders.own = [sealed(1), sealed(2, value=b"")]

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(1),)

    following(holders, scene)


def test_a_thorough_look_finds_the_holders_anew_and_asks_more_of_them() -> None:
    holders = Holders(20, records=[sealed()])

    async def scene(followed: FollowedKey) -> None:
        await followed.read(thorough=True)
        assert holders.looked == [(limits.LOCATED_HOLDERS, limits.RELOCATE_S)]
        assert len(holders.names()) == followed.answers == limits.READ_HOLDERS_THOROUGH

    following(holders, scene)


def test_now_and_then_another_holder_takes_the_place_of_one() -> None:
    holders = Holders(records=[sealed(ttl_s=3600)])
    order = order_of(b"salt")

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        await asyncio.sleep(limits.ROTATE_S - 1.0)
        assert holders.names() == order[:4]
        await followed.read()
        assert holders.names() == order[:4]
        await asyncio.sleep(1.0)
        for turn in range(1, 12):
            await followed.read()
            assert holders.names() == [order[(turn + place) % 10] for place in range(4)]
            await asyncio.sleep(limits.ROTATE_S)

    following(holders, scene)


def test_what_one_holder_hides_another_tells_in_its_turn() -> None:
    holders = Holders(records=[sealed(1)])
    order = order_of(b"salt")
    for number in order[4:]:
        holders.held[CONTACTS[number].id].append(sealed(2))

    async def scene(followed: FollowedKey) -> None:
        assert len(await followed.read()) == 1
        await asyncio.sleep(limits.ROTATE_S - 30)
        assert len(await followed.read()) == 1
        await asyncio.sleep(30)
        assert sealed(2) in await followed.read()

    following(holders, scene)


def test_a_holder_that_tells_all_it_has_and_lacks_something_is_told_and_one_that_tells_what_is_new_is_not() -> None:
    long = sealed(1, ttl_s=3600)
    holders = Holders(records=[long])
    order = order_of(b"salt")
    forgetful = CONTACTS[order[4]]
    holders.held[forgetful.id].clear()

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        await asyncio.sleep(limits.CORRECTED_AFTER_S)
        await followed.read()
        assert holders.corrected == [], "the four had nothing new to tell, which is no lack"
        await asyncio.sleep(limits.ROTATE_S)
        await followed.read()
        assert holders.corrected == [(forgetful, [long])]

    following(holders, scene)


def test_a_holder_that_is_no_longer_near_and_comes_back_is_asked_for_all() -> None:
    holders = Holders(4, records=[sealed()])

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        holders.nearest = CONTACTS[1:5]
        await followed.read()
        holders.nearest, holders.asked = CONTACTS[:4], []
        await followed.read()
        assert {CONTACTS.index(asked.contact): asked.since == b"" for asked in holders.asked} == {
            0: True,
            1: False,
            2: False,
            3: False,
        }

    following(holders, scene)


def test_a_read_that_is_cancelled_leaves_nothing_behind_and_the_next_one_reads() -> None:
    holders = Holders(records=[sealed()])

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        holders.slow, holders.asked = dict.fromkeys(holders.held), []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await followed.read()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(holders.asked) == limits.READ_HOLDERS
        await asyncio.sleep(10)
        assert not any(asked.ended for asked in holders.asked)
        holders.slow.clear()
        assert await followed.read() == (sealed(),)

    following(holders, scene)


def test_reads_of_one_key_come_one_after_the_other() -> None:
    holders = Holders(records=[sealed()])

    async def scene(followed: FollowedKey) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(followed.read())
        assert [bool(asked.since) for asked in holders.asked] == [False] * 4 + [True] * 8

    following(holders, scene)


@pytest.mark.parametrize("sequence", [1, 2])
def test_a_withdrawal_that_was_told_hides_an_older_copy_that_the_reader_holds_itself(sequence: int) -> None:
    holders = Holders(records=[sealed(sequence=2, value=b"")])
    holders.own = [sealed(sequence=sequence, value=b"" if sequence == 2 else b"old")]

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == ()

    following(holders, scene)


def test_what_the_reader_itself_has_newer_counts() -> None:
    holders = Holders(records=[sealed(sequence=2, value=b"")])
    holders.own = [seal_record(identity(1), KEY, b"sub", 3, 60, b"again")]

    async def scene(followed: FollowedKey) -> None:
        assert [record.value for record in await followed.read()] == [b"again"]

    following(holders, scene)


def test_a_holder_that_is_asked_first_and_says_that_records_are_nearly_over_hides_none() -> None:
    holders = Holders(records=[sealed(ttl_s=60)])
    holders.left_s[CONTACTS[order_of(b"salt")[0]].id] = 1.0

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        await asyncio.sleep(10)
        assert await followed.read() == (sealed(ttl_s=60),)

    following(holders, scene)


def test_a_flood_by_a_holder_that_is_asked_later_crowds_out_nothing_that_several_have() -> None:
    real = [plain(1_000_000 + number) for number in range(limits.RECORDS_PER_KEY_MAX // 2 + 300)]
    holders = Holders(records=real)
    liar = CONTACTS[order_of(b"salt")[2]]
    holders.held[liar.id] = [plain(number) for number in range(limits.RECORDS_PER_KEY_MAX // 2)]

    async def scene(followed: FollowedKey) -> None:
        found = await followed.read()
        assert sum(record.subkey >= (1_000_000).to_bytes(4, "big") for record in found) == len(real)

    following(holders, scene)
