"""Keys that are followed: whom a reader asks for what."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from kademlia.node import Node

from netsim.loop import run
from overlay.dht import limits
from overlay.dht.following import FollowedKey, _Later
from overlay.dht.lookup import Found
from overlay.dht.pages import lacks
from overlay.dht.records import Record, location_of, seal_record
from overlay.dht.table import Contact
from tests.overlay.dht.test_following_known import CONTACTS, plain, told
from tests.overlay.dht.test_records import KEY, sealed
from tests.overlay.network import identity

ANSWER_S = 0.05
RPC_S = limits.RPC_TIMEOUT_MAX_S


@dataclass
class Asked:
    contact: Contact
    since: bytes
    known: int
    at: float
    ended: bool = False
    told: int = 0


class Holders:
    """Holders in virtual time: each has its records, and may be dead, slow, or of few words."""

    def __init__(self, count: int = 10, records: Sequence[Record] = ()) -> None:
        self.nearest = CONTACTS[:count]
        self.held: dict[bytes, list[Record]] = {contact.id: list(records) for contact in CONTACTS}
        self.dead: dict[bytes, None] = {}
        self.slow: dict[bytes, None] = {}
        self.left_s: dict[bytes, float] = {}
        self.busy_until: dict[bytes, float] = {}
        """Who says to ask later, until which second of the scene."""
        self.began = 0.0
        self.page: int | None = None
        """How many records a busy one tells before it says so; None where it tells nothing."""
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
        if self.time_s() < self.busy_until.get(contact.id, 0.0):
            if self.page is None:
                return Found((), later_s=limits.LATER_MIN_S)
            first = [record for record in new if record.fingerprint not in known][: self.page]
            asked.told = len(first)
            cursor = held.index(first[-1]) + 1
            return replace(told(*first, cursor=cursor.to_bytes(4, "big")), later_s=limits.LATER_MIN_S)
        unknown = [record for record in new if record.fingerprint not in known]
        asked.told = len(unknown)
        found = told(*unknown, cursor=len(held).to_bytes(4, "big"), left_s=self.left_s.get(contact.id))
        return replace(found, lacks=() if since else lacks(known, [record.fingerprint for record in held]))

    def records_of(self, key: bytes) -> list[Record]:
        return self.own

    def correct(self, contact: Contact, records: Sequence[Record]) -> None:
        self.corrected.append((contact, list(records)))

    def time_s(self) -> float:
        """Of the scene."""
        return asyncio.get_running_loop().time() - self.began

    def names(self) -> list[int]:
        """Who was asked since the last time, by number."""
        asked, self.asked = self.asked, []
        return [CONTACTS.index(entry.contact) for entry in asked]


def following(holders: Holders, scene: Callable[[FollowedKey], Awaitable[None]], salt: bytes = b"salt") -> None:
    async def main() -> None:
        async with asyncio.timeout(3600):
            holders.began = asyncio.get_running_loop().time()
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


def test_of_all_that_a_lookup_heard_of_only_the_nearest_are_asked() -> None:
    """Farther ones hold what few publishers bring: four of them know fewer servers than there are."""
    holders = Holders(count=18, records=[sealed()])

    async def scene(followed: FollowedKey) -> None:
        await followed.read(thorough=True)
        assert sorted(holders.names()) == list(range(limits.LOCATED_HOLDERS))

    following(holders, scene)


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


def test_while_each_tells_much_that_the_others_lacked_they_are_asked_one_after_the_other() -> None:
    """Where a network grows no holder has everything; asked at once, each of the others would tell all that the first lacked."""
    many = [sealed(number) for number in range(4 * limits.MUCH_TOLD_RECORDS)]
    holders = Holders(records=many)
    first, second = order_of(b"salt")[:2]
    holders.held[CONTACTS[first].id] = many[: -limits.MUCH_TOLD_RECORDS]

    async def scene(followed: FollowedKey) -> None:
        assert len(await followed.read()) == len(many)
        assert [asked.told for asked in holders.asked] == [3 * limits.MUCH_TOLD_RECORDS, limits.MUCH_TOLD_RECORDS, 0, 0]
        began = [round((asked.at - holders.asked[0].at) / ANSWER_S) for asked in holders.asked]
        assert began == [0, 1, 2, 3]
        assert holders.names()[:2] == [first, second]

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
        assert holders.looked == [(limits.LOCATED_HOLDERS, limits.THOROUGH_S)]
        assert len(holders.names()) == followed.answers == limits.READ_HOLDERS_THOROUGH

    following(holders, scene)


def test_a_thorough_look_finds_all_holders_anew_before_a_key_is_said_to_have_no_records() -> None:
    holders = Holders()

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read(thorough=True) == ()
        assert holders.looked == [(limits.LOCATED_HOLDERS, limits.THOROUGH_S), (limits.KSIZE, limits.THOROUGH_S)]

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


# --- holders that say later ---


def test_who_says_later_is_replaced_at_once_and_asked_with_the_next_read() -> None:
    holders = Holders(records=[sealed(1), sealed(2)])
    order = order_of(b"salt")
    holders.busy_until[CONTACTS[order[0]].id] = 1.0

    async def scene(followed: FollowedKey) -> None:
        assert len(await followed.read()) == 2
        assert followed.answers == limits.READ_HOLDERS
        assert holders.time_s() < limits.LATER_MIN_S, "nobody waited for it"
        assert holders.names() == order[: limits.READ_HOLDERS + 1]
        await followed.read()
        assert order[0] not in holders.names(), "its time isn't over"
        await asyncio.sleep(1.0)
        await followed.read()
        assert holders.names() == order[: limits.READ_HOLDERS]

    following(holders, scene)


def test_where_all_say_later_they_are_asked_again_each_time_after_twice_as_long_and_nobody_is_told_of_it() -> None:
    holders = Holders(records=[sealed()])
    holders.busy_until = {contact.id: 3.0 for contact in CONTACTS}

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(),)
        assert followed.answers == limits.READ_HOLDERS
        assert 3.0 < holders.time_s() < 3.0 + limits.LATER_MAX_S
        first = [round(asked.at, 1) for asked in holders.asked if asked.contact == holders.asked[0].contact]
        assert [round(then - before, 1) for before, then in itertools.pairwise(first)] == pytest.approx(
            [ANSWER_S + wait_s for wait_s in (0.5, 1.0, 2.0)], abs=0.1
        )

    following(holders, scene)


def test_those_that_say_later_for_ever_hold_a_read_up_no_longer_than_a_lookup_takes() -> None:
    holders = Holders(records=[sealed()])
    holders.busy_until = {contact.id: float("inf") for contact in CONTACTS}

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == ()
        assert followed.answers == 0
        assert holders.time_s() == pytest.approx(limits.LOOKUP_S, abs=0.1)
        asked = Counter(asked.contact.id for asked in holders.asked)
        assert max(asked.values()) <= 2 + limits.LOOKUP_S / limits.LATER_MAX_S

    following(holders, scene)


def test_one_that_says_later_for_ever_is_asked_for_ever_and_an_empty_key_is_soon_said_to_be_one() -> None:
    """Thousands of times in a row: how often it said so is no reason to fail."""
    holders = Holders()
    liar = CONTACTS[order_of(b"salt")[0]]
    holders.busy_until[liar.id] = float("inf")

    async def scene(followed: FollowedKey) -> None:
        followed._later[liar.id] = _Later(0.0, 5000)
        assert await followed.read() == ()
        assert holders.time_s() == pytest.approx(limits.LATER_WAITED_S, abs=0.1)
        assert followed._later[liar.id].times > 5000

    following(holders, scene)


def test_the_empty_words_of_one_that_has_nothing_do_not_stand_for_those_that_say_later() -> None:
    """In a network that begins, the few that have been near a key for long have everything, and much to send."""
    holders = Holders()
    full = order_of(b"salt")[0]
    holders.held[CONTACTS[full].id].append(sealed())
    holders.busy_until[CONTACTS[full].id] = limits.LATER_WAITED_S - 1.0

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(),)

    following(holders, scene)


def test_where_something_is_known_nobody_waits_for_those_that_say_later() -> None:
    holders = Holders(records=[sealed()])
    holders.busy_until = {contact.id: float("inf") for contact in holders.nearest[1:]}

    async def scene(followed: FollowedKey) -> None:
        assert await followed.read() == (sealed(),)
        assert followed.answers == 1
        assert holders.time_s() < limits.LATER_MIN_S

    following(holders, scene)


def test_what_a_holder_told_before_it_said_later_counts_and_the_rest_is_asked_of_others_and_then_of_it() -> None:
    many = [sealed(number) for number in range(6)]
    holders = Holders(records=many)
    holders.page = 2
    first = order_of(b"salt")[0]
    holders.busy_until[CONTACTS[first].id] = 0.4

    async def scene(followed: FollowedKey) -> None:
        assert len(await followed.read()) == len(many)
        asked = holders.asked[: limits.READ_HOLDERS + 1]
        assert [(entry.known, entry.told) for entry in asked] == [(0, 2), (2, 4), (6, 0), (6, 0), (6, 0)]
        await asyncio.sleep(limits.LATER_MAX_S)
        holders.asked.clear()
        await followed.read()
        again = next(entry for entry in holders.asked if entry.contact == CONTACTS[first])
        assert (again.since, again.known, again.told) == ((2).to_bytes(4, "big"), len(many), 0), (
            "it hears what is known"
        )

    following(holders, scene)


def test_a_holder_that_says_later_keeps_its_cursor() -> None:
    holders = Holders(records=[sealed(1)])
    first = order_of(b"salt")[0]

    async def scene(followed: FollowedKey) -> None:
        await followed.read()
        holders.busy_until[CONTACTS[first].id] = 5.0
        await followed.read()
        await asyncio.sleep(10.0)
        holders.asked.clear()
        await followed.read()
        assert {asked.since for asked in holders.asked} == {(1).to_bytes(4, "big")}

    following(holders, scene)
