"""What a server says of itself, and how often: states at once, figures seldom and only when they matter."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any, cast

from overlay.identity import PEER_ID_PREFIX, PeerId
from peerd.announcer import FIGURES_S_MIN, SPAN_TTL_S, Announcer
from routing.catalog import ModelView
from routing.records import BLOCKS_PER_GROUP, NEIGHBOURS_MAX, SpanRecord, State, decode_record, span_keys
from routing.types import Span
from tests.routing.servers import FLOAT32, MODEL

BLOCKS = 4 * BLOCKS_PER_GROUP
OWN = b"own"
FIRST = Span(0, 8)


@dataclass
class Board:
    """The DHT, the swarm, the host and the clock, as far as an announcer sees them."""

    published: list[tuple[bytes, SpanRecord]] = field(default_factory=list)
    withdrawn: list[bytes] = field(default_factory=list)
    own: dict[bytes, SpanRecord] = field(default_factory=dict)
    others: tuple[SpanRecord, ...] = ()
    rtts: list[tuple[bytes, float | None]] = field(default_factory=list)
    time: float = 100.0

    def publish(self, key: bytes, subkey: bytes, value: bytes, ttl_s: float) -> None:
        assert (subkey, ttl_s) == (MODEL, SPAN_TTL_S)
        self.published.append((key, decode_record(value)))

    async def withdraw(self, key: bytes, subkey: bytes) -> None:
        self.withdrawn.append(key)

    def put_own(self, record: SpanRecord, blocks: int) -> None:
        assert blocks == BLOCKS
        self.own[record.model] = record

    def remove_own(self, model: bytes) -> None:
        del self.own[model]

    def view(self, model: bytes) -> ModelView:
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
