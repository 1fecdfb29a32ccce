"""What a server says of itself, and how often: states at once, figures seldom and only when they matter; manifests by a few."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from blocks.model.identity import FileDigest, Manifest, model_id
from overlay.errors import LimitExceeded
from overlay.identity import PEER_ID_PREFIX, PeerId
from peerd import announcer as announcing
from peerd.announcer import (
    CONTESTED_S,
    FIGURES_S_MIN,
    KEEPERS_S,
    MANIFEST_KEEPERS,
    MANIFEST_TTL_S,
    NEIGHBOURS_S_MIN,
    OTHERS_MIN,
    SPAN_TTL_S,
    Announcer,
    keeps_manifest,
)
from peerd.manifest_record import encode_manifest
from peerd.swarm import KnownModel
from routing.catalog import ModelView
from routing.records import BLOCKS_PER_GROUP, MANIFESTS_KEY, NEIGHBOURS_MAX, SpanRecord, State, decode_record, span_keys
from routing.types import Span
from tests.peerd.test_swarm import Member, run_members
from tests.routing.servers import FLOAT32, MODEL

BLOCKS = 4 * BLOCKS_PER_GROUP
OWN = b"own"
FIRST = Span(0, 8)
MANIFEST = Manifest(MODEL, "tiny", "demo", None, "{}", (), FLOAT32, (FileDigest("tokenizer.json", 2, bytes(32)),), ())
"""Nobody decodes it."""
FORGED = replace(MANIFEST, files=(FileDigest("tokenizer.json", 3, bytes(32)),))


@dataclass
class Board:
    """The DHT, the swarm, the host and the clock, as far as an announcer sees them."""

    published: list[tuple[bytes, SpanRecord]] = field(default_factory=list)
    withdrawn: list[bytes] = field(default_factory=list)
    own: dict[bytes, SpanRecord] = field(default_factory=dict)
    others: tuple[SpanRecord, ...] = ()
    rtts: list[tuple[bytes, float | None]] = field(default_factory=list)
    time: float = 100.0
    views: int = 0
    network: KnownModel | None = None
    forgers: tuple[bytes, ...] = ()
    manifests: list[bytes] = field(default_factory=list)
    """Those that are renewed now."""
    full: bool = False
    looked: float = float("inf")
    """When the swarm looked at servers the last time."""
    peer_id: PeerId = field(default_factory=lambda: PeerId(OWN))

    def publish(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> None:
        if key == MANIFESTS_KEY:
            if self.full:
                raise LimitExceeded("full")
            assert (subkey, ttl_s) == (MODEL, MANIFEST_TTL_S)
            self.manifests = [value]
            return
        assert (subkey, ttl_s) == (MODEL, SPAN_TTL_S)
        self.published.append((key, decode_record(value)))

    async def withdraw(self, key: bytes, subkey: bytes) -> None:
        self.withdrawn.append(key)

    def abandon(self, key: bytes, subkey: bytes) -> None:
        assert (key, subkey) == (MANIFESTS_KEY, MODEL)
        self.manifests.clear()

    def put_own_manifest(self, manifest: Manifest) -> None:
        before = self.network or KnownModel(manifest, ())
        self.network = KnownModel(before.manifest, (*before.publishers, OWN))

    def is_known_since(self, model: bytes, seconds: float) -> bool:
        assert model == MODEL
        return self.time - self.looked <= seconds

    def manifest_claims(self, model: bytes) -> list[tuple[Manifest, bytes]]:
        network = self.network
        said = [] if network is None else [(network.manifest, peer) for peer in network.publishers if peer != OWN]
        return [*said, *((FORGED, peer) for peer in self.forgers)]

    def put_own(self, record: SpanRecord, blocks: int) -> None:
        assert blocks == BLOCKS
        self.own[record.model] = record

    def remove_own(self, model: bytes) -> None:
        del self.own[model]

    def view(self, model: bytes) -> ModelView:
        self.views += 1
        return ModelView(MODEL, BLOCKS, self.others)

    def rtt_s(self, peer: PeerId) -> float | None:
        return dict(self.rtts).get(peer.multihash)

    def now(self) -> float:
        return self.time

    def announcer(self) -> Announcer:
        board = cast(Any, self)
        return Announcer(board, board, board, board)


def record(span: Span = FIRST, state: State = State.ONLINE, **figures: Any) -> SpanRecord:
    return SpanRecord(OWN, ("/ip4/127.0.0.1/tcp/1",), MODEL, span, state, FLOAT32, step_s=0.01, **figures)


def test_states_are_told_at_once_and_figures_are_not() -> None:
    board = Board()
    announcer = board.announcer()
    announcer.announce(record(state=State.JOINING), BLOCKS)
    announcer.announce(record(), BLOCKS)
    announcer.announce(record(queue_s=1.0), BLOCKS)
    assert [told.state for _, told in board.published] == [State.JOINING, State.ONLINE]
    board.time += 1.0
    announcer.announce(record(queue_s=1.0), BLOCKS)
    assert board.published[-1][1].queue_s == 1.0
    announcer.drain()
    assert board.published[-1][1].state is State.DRAINING
    assert board.own[MODEL].state is State.DRAINING


def test_a_moved_span_leaves_the_keys_that_it_no_longer_touches() -> None:
    board = Board()
    announcer = board.announcer()
    before, after = Span(0, 2 * BLOCKS_PER_GROUP), Span(BLOCKS_PER_GROUP, 3 * BLOCKS_PER_GROUP)
    announcer.announce(record(before), BLOCKS)
    announcer.announce(record(after), BLOCKS)
    asyncio.run(announcer.withdraw_stale())
    assert board.withdrawn == [span_keys(MODEL, before)[0]]
    assert {key for key, told in board.published if told.span == after} == set(span_keys(MODEL, after))


def test_leaving_takes_everything_back() -> None:
    board = Board()
    announcer = board.announcer()
    announcer.announce(record(), BLOCKS)
    asyncio.run(announcer.withdraw())
    assert set(span_keys(MODEL, Span(0, 8))) <= set(board.withdrawn)
    assert board.own == {}


def follow(announcer: Announcer, board: Board, seconds: float, **figures: Any) -> int:
    """One sample a second; returns how many records went out."""
    before = len(board.published)
    for _ in range(round(seconds)):
        board.time += 1.0
        announcer.follow(replace(record(), **figures))
    return len(board.published) - before


def test_a_steady_server_says_nothing_and_a_busy_one_says_so_a_few_times() -> None:
    board = Board()
    announcer = board.announcer()
    announcer.announce(record(free_tokens=1000), BLOCKS)
    assert follow(announcer, board, 300, free_tokens=990) == 0
    told = follow(announcer, board, 60, free_tokens=990, queue_s=0.5)
    assert 1 <= told <= 60 / FIGURES_S_MIN
    assert 0.3 < board.own[MODEL].queue_s <= 0.5, "smoothed, and it gets there"
    assert follow(announcer, board, 60, free_tokens=10, queue_s=0.5) >= 1
    assert board.own[MODEL].free_tokens == 10


def test_stores_stay_under_what_holders_take_in_a_minute() -> None:
    board = Board()
    announcer = board.announcer()
    whole = record(Span(0, BLOCKS))
    announcer.announce(whole, BLOCKS)
    before = len(board.published)
    for second in range(60):
        board.time += 1.0
        announcer.follow(replace(whole, free_tokens=1000 * (second % 7)))
    assert 0 < len(board.published) - before <= 40


def test_round_trips_to_other_servers_are_told_nearest_first() -> None:
    peers = [PEER_ID_PREFIX + bytes([65 + number]) * 32 for number in range(NEIGHBOURS_MAX + 4)]
    board = Board(
        others=tuple(replace(record(), peer=peer) for peer in peers),
        rtts=[
            (PEER_ID_PREFIX + bytes(32), 0.001),
            (peers[0], None),
            *((peer, 0.5 - 0.01 * index) for index, peer in enumerate(peers[1:])),
        ],
    )
    announcer = board.announcer()
    announcer.announce(record(), BLOCKS)
    assert follow(announcer, board, 10) == 1
    told = board.own[MODEL].neighbour_rtts
    assert [peer for peer, _ in told] == peers[::-1][:NEIGHBOURS_MAX]


def nearer_each_second(board: Board) -> tuple[bytes, ...]:
    """From now on there is a nearer server than all before; returns the first `NEIGHBOURS_MAX` of them."""
    peers = [PEER_ID_PREFIX + number.to_bytes(32, "big") for number in range(1, 400)]
    board.others = tuple(replace(record(), peer=peer) for peer in peers)
    board.rtts = [(peer, 1.0 - 0.001 * number) for number, peer in enumerate(peers[:NEIGHBOURS_MAX])]
    return tuple(peers)


def test_new_neighbours_alone_wait_until_the_record_is_renewed_anyway() -> None:
    board = Board()
    announcer = board.announcer()
    peers = nearer_each_second(board)
    announcer.announce(record(), BLOCKS)
    assert follow(announcer, board, FIGURES_S_MIN) == 1, "the first list is told as any figures are"
    ages = []
    told_at = board.time
    for number in range(300):
        board.rtts.append((peers[NEIGHBOURS_MAX + number], 0.5 - 0.001 * number))
        if follow(announcer, board, 1):
            ages.append(board.time - told_at)
            told_at = board.time
    assert len(ages) >= 300 // (SPAN_TTL_S / 2)
    assert all(NEIGHBOURS_S_MIN <= age <= SPAN_TTL_S / 2 for age in ages)


def test_figures_that_matter_take_new_neighbours_with_them() -> None:
    board = Board()
    announcer = board.announcer()
    peers = nearer_each_second(board)
    announcer.announce(record(), BLOCKS)
    follow(announcer, board, FIGURES_S_MIN)
    board.rtts.append((peers[-1], 0.001))
    assert follow(announcer, board, FIGURES_S_MIN, free_tokens=1000) == 1
    assert board.own[MODEL].neighbour_rtts[0] == (peers[-1], 0.001)


def test_servers_are_sorted_only_when_it_is_time_to_tell() -> None:
    board = Board()
    announcer = board.announcer()
    nearer_each_second(board)
    announcer.announce(record(), BLOCKS)
    follow(announcer, board, FIGURES_S_MIN - 1, queue_s=9.0)
    assert board.views == 0
    assert follow(announcer, board, 1, queue_s=0.0) == 1
    board.views = 0
    follow(announcer, board, NEIGHBOURS_S_MIN - 1, queue_s=board.own[MODEL].queue_s)
    assert board.views == 0
    follow(announcer, board, 100, queue_s=board.own[MODEL].queue_s)
    assert 0 < board.views <= 100 / FIGURES_S_MIN


# --- who keeps a manifest ---


def in_order_of_the_draw(count: int) -> list[SpanRecord]:
    """Servers that would all be drawn before us, then all those that wouldn't, ``count`` of each."""

    def draw(peer: bytes) -> bytes:
        return hashlib.sha256(b"peerd/manifest-keeper/1" + MODEL + peer).digest()

    peers = sorted((number.to_bytes(4, "big") for number in range(40 * count)), key=draw)
    before = [peer for peer in peers if draw(peer) < draw(OWN)]
    after = [peer for peer in peers if draw(peer) > draw(OWN)]
    assert min(len(before), len(after)) >= count
    return [replace(record(), peer=peer) for peer in (*before[:count], *after[:count])]


ORDERED = in_order_of_the_draw(2 * MANIFEST_KEEPERS)
AFTER = ORDERED[2 * MANIFEST_KEEPERS :]


@pytest.mark.parametrize(("before", "begins", "goes_on"), [
    (0, True, True), (MANIFEST_KEEPERS - 1, True, True), (MANIFEST_KEEPERS, False, True),
    (2 * MANIFEST_KEEPERS - 1, False, True), (2 * MANIFEST_KEEPERS, False, False),
])  # fmt: skip
def test_the_first_of_a_draw_keep_a_manifest_and_who_does_goes_on_for_a_while(
    before: int, begins: bool, goes_on: bool
) -> None:
    for servers in (ORDERED[:before], [*AFTER, *ORDERED[:before]], [record(), *reversed(ORDERED[:before])]):
        assert keeps_manifest(MODEL, OWN, servers, publishes=False) is begins
        assert keeps_manifest(MODEL, OWN, servers, publishes=True) is goes_on


def test_who_leaves_keeps_no_manifest_and_who_loads_does() -> None:
    first = ORDERED[: MANIFEST_KEEPERS - 1]
    leaving = replace(ORDERED[MANIFEST_KEEPERS], state=State.DRAINING)
    loading = replace(leaving, state=State.JOINING)
    assert keeps_manifest(MODEL, OWN, [*first, leaving], publishes=False)
    assert not keeps_manifest(MODEL, OWN, [*first, loading], publishes=False)


def test_every_model_has_keepers_of_its_own() -> None:
    servers = ORDERED[:MANIFEST_KEEPERS]
    other_models = [hashlib.sha256(bytes([number])).digest() for number in range(8)]
    assert any(keeps_manifest(cast(Any, model), OWN, servers, publishes=False) for model in other_models)


def crowd(before: int, publishers: int = MANIFEST_KEEPERS, manifest: Manifest = MANIFEST) -> Board:
    """A network in which ``before`` servers are drawn before us, and so many publish a manifest."""
    named = tuple(server.peer for server in ORDERED[:publishers])
    return Board(others=tuple(ORDERED[:before]), network=KnownModel(manifest, named))


def judge(announcer: Announcer, board: Board, seconds: float = KEEPERS_S) -> list[Manifest]:
    """What is published once ``seconds`` are over."""
    board.time += seconds
    announcer.keep_manifests()
    known = {encode_manifest(manifest): manifest for manifest in (MANIFEST, FORGED)}
    return [known[value] for value in board.manifests]


def test_who_knows_nobody_publishes_its_manifest_at_once() -> None:
    board = Board()
    board.announcer().announce_manifest(MANIFEST)
    assert board.manifests == [encode_manifest(MANIFEST)]


def test_a_server_of_a_crowd_knows_its_manifest_and_leaves_it_to_the_keepers() -> None:
    board = crowd(MANIFEST_KEEPERS)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    assert board.network is not None
    assert OWN in board.network.publishers
    assert judge(announcer, board) == []


def test_a_server_begins_to_keep_a_manifest_when_others_go_and_ends_when_many_came() -> None:
    board = crowd(MANIFEST_KEEPERS)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    assert judge(announcer, board) == []
    board.others = board.others[1:]
    assert judge(announcer, board, KEEPERS_S - 1) == [], "not every second"
    assert judge(announcer, board, 1) == [MANIFEST]
    board.others = tuple(ORDERED[: 2 * MANIFEST_KEEPERS - 1])
    assert judge(announcer, board) == [MANIFEST]
    board.others = tuple(ORDERED)
    assert judge(announcer, board) == []


def test_nobody_begins_to_keep_a_manifest_because_servers_were_not_looked_at() -> None:
    """What is known of servers ends after a minute: seen with 700 of them that looked each minute."""
    board = crowd(MANIFEST_KEEPERS)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    board.looked, board.others = board.time, ()
    assert judge(announcer, board, SPAN_TTL_S + 0.1) == []
    board.looked = board.time
    assert judge(announcer, board) == [MANIFEST]
    assert judge(announcer, board, 2 * SPAN_TTL_S) == [MANIFEST], "nor ends anybody"


def test_a_manifest_that_is_kept_already_is_not_published_again() -> None:
    board = crowd(0)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    board.manifests = []
    assert judge(announcer, board) == [], "the DHT renews it"


def test_a_manifest_made_anew_replaces_the_one_that_is_published_or_ends_it() -> None:
    board = crowd(0)
    announcer = board.announcer()
    announcer.announce_manifest(FORGED)
    board.network = crowd(0).network
    board.others = tuple(ORDERED[: 2 * MANIFEST_KEEPERS - 1])
    announcer.announce_manifest(MANIFEST)
    assert board.manifests == [encode_manifest(MANIFEST)]
    board.others = tuple(ORDERED)
    announcer.announce_manifest(MANIFEST)
    assert board.manifests == []


def test_where_the_networks_manifest_differs_every_server_publishes_its_own_for_long() -> None:
    board = crowd(len(ORDERED), manifest=FORGED)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    assert board.manifests == [encode_manifest(MANIFEST)]
    board.network = crowd(0).network
    assert judge(announcer, board) == [MANIFEST], "outvoted for now"
    assert judge(announcer, board, CONTESTED_S - KEEPERS_S - 1) == [MANIFEST]
    assert judge(announcer, board, KEEPERS_S) == []
    board.network = crowd(0, manifest=replace(MANIFEST, name="another", compute=FLOAT32)).network
    assert judge(announcer, board) == [], "a name proves nothing"
    board.network = crowd(0, manifest=FORGED).network
    assert judge(announcer, board) == [MANIFEST]


@pytest.mark.parametrize(("forgers", "published"), [(0, False), (16, False), (17, True)])
def test_a_few_who_say_something_else_don_t_make_a_crowd_speak_but_half_as_many_as_agree_do(
    forgers: int, published: bool
) -> None:
    board = crowd(len(ORDERED), 32)
    board.forgers = tuple(server.peer for server in ORDERED[32 : 32 + forgers])
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    assert bool(board.manifests) is published


@pytest.mark.parametrize(("publishers", "published"), [(0, True), (OTHERS_MIN - 1, True), (OTHERS_MIN, False)])
def test_where_hardly_anybody_publishes_a_manifest_every_server_does(publishers: int, published: bool) -> None:
    board = crowd(len(ORDERED), publishers)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    assert bool(board.manifests) is published
    assert bool(judge(announcer, board)) is published, "its own word isn't counted"


def test_leaving_takes_back_manifests_also_those_that_were_left_to_their_end() -> None:
    for before in (0, len(ORDERED)):
        board = crowd(before)
        announcer = board.announcer()
        announcer.announce_manifest(MANIFEST)
        asyncio.run(announcer.withdraw())
        assert board.withdrawn == [MANIFESTS_KEY], "of what was never published the DHT says nothing"
        board.network, board.manifests = None, []
        assert judge(announcer, board) == [], "and publishes them no more"


def test_a_full_table_of_records_ends_nothing_and_is_tried_again() -> None:
    board = crowd(MANIFEST_KEEPERS)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    board.others, board.full = (), True
    assert judge(announcer, board) == []
    board.full = False
    assert judge(announcer, board) == [MANIFEST]


def test_manifests_are_looked_after_as_long_as_figures_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "SAMPLE_S", 0.0)
    board = crowd(MANIFEST_KEEPERS)
    announcer = board.announcer()
    announcer.announce_manifest(MANIFEST)
    board.others = ()

    async def main() -> None:
        async with asyncio.timeout(10):
            following = asyncio.create_task(announcer.keep_told(lambda told: told))
            while not board.manifests:
                await asyncio.sleep(0)
            following.cancel()

    asyncio.run(main())


def test_a_server_sees_through_its_own_manifest_what_the_network_agrees_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real swarm and DHT, where nobody is a keeper and one publisher is enough."""
    config = '{"num_hidden_layers":4}'
    sound = replace(MANIFEST, model=model_id({"num_hidden_layers": 4}, ()), config=config)
    monkeypatch.setattr(announcing, "MANIFEST_KEEPERS", 0)
    monkeypatch.setattr(announcing, "OTHERS_MIN", 1)

    def published(member: Member) -> Sequence[object]:
        return [found for found in member.dht.records_of(MANIFESTS_KEY) if found.publisher == member.host.peer_id]

    async def scene(one: Member, mallory: Member, reader: Member) -> None:
        mallory.announcer.announce_manifest(sound)
        while reader.swarm.known(sound.model) is None:
            await reader.swarm.refresh()
        reader.announcer.announce_manifest(sound)
        assert not published(reader)
        while one.swarm.known(sound.model) is None:
            await one.swarm.refresh()
        one.announcer.announce_manifest(replace(sound, files=FORGED.files))
        assert published(one)

    run_members(3, scene)
