"""Hidden states through real nodes: the bits of the blocks themselves, whatever happens to the route."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from blocks.model.source import resolve
from blocks.model.span import load_span
from overlay.errors import DialError, PeerdError
from overlay.rpc.types import Part
from peerd import hidden_sessions
from peerd.driving import RouteWish, Surroundings
from peerd.generation import Stopping
from peerd.hidden_sessions import (
    HiddenSession,
    HiddenSessions,
    JournalRoom,
    SessionConflict,
    SessionsFull,
    UnknownSession,
)
from routing.types import Span
from tests.models import make_tiny
from tests.ring import Plans, Ring, route, until

WIDTH, MOST = 32, 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


class Scene:
    """Two servers, a replica of the second, and a driver that serves nothing."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.sessions = HiddenSessions()
        self.lost = False

    async def build(self) -> None:
        self.first = await self.ring.node(0, 2)
        self.second = await self.ring.node(2, 4)
        self.replica = await self.ring.node(2, 4)
        self.driver = await self.ring.node()
        self.plans = Plans([route(self.first.hop(), node.hop()) for node in (self.second, self.replica)])
        self.around: Surroundings = (await self.ring.pool(self.driver, self.plans)).around

    def open(self, span: Span | None = None, wait_s: float = 10.0, prompts: Part | None = None) -> HiddenSession:
        return self.sessions.open(self.around, RouteWish(self.ring.model(), MOST, wait_s, span, prompts))

    @property
    def served(self) -> int:
        """What servers hold; one that vanished holds it until its lease ends."""
        return sum(node.hops.session_count for node in self.ring.nodes if not (self.lost and node is self.second))

    def lose_second(self) -> None:
        self.lost = True
        self.second.vanish()


def play(directory: Path, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), Ring(directory) as ring:
            stage = Scene(ring)
            await stage.build()
            try:
                await scene(stage)
            finally:
                stage.sessions.close_all(Stopping("over"))
            await until(lambda: stage.served == 0)
            assert stage.sessions.journals.used_bytes == 0

    asyncio.run(main())


def states(count: int, seed: int = 0) -> Part:
    values = torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed)).numpy()
    return Part("hidden", "float32", values.shape, values.tobytes())


def rows(parts: list[Part]) -> np.ndarray:
    return np.concatenate([np.frombuffer(part.data, np.float32).reshape(part.shape) for part in parts])


def local(
    directory: Path, steps: list[tuple[int, Part]], start: int = 0, end: int = 4, prompts: Part | None = None
) -> list[np.ndarray]:
    """What the blocks themselves answer to (position, states)."""
    span = load_span(resolve(str(directory)), start, end, prepare_steps=False)
    cache = span.new_cache(MOST)
    added = None if prompts is None else tensor(prompts)
    return [span.forward(tensor(part)[None], position, cache, added)[0].numpy() for position, part in steps]


def tensor(part: Part) -> torch.Tensor:
    return torch.frombuffer(bytearray(part.data), dtype=torch.float32).view(part.shape)


def deep_prompts(blocks: int) -> Part:
    values = torch.randn((blocks, 11, WIDTH), generator=torch.Generator().manual_seed(9)).numpy()
    return Part(
        "prompts", "float32", values.shape, values.tobytes()
    )  # past the first step, so the second has some, too


STEPS = [(0, states(9)), (9, states(1, 1)), (10, states(1, 2)), (11, states(4, 3)), (15, states(1, 4))]


def test_steps_give_the_bits_of_the_blocks(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        for (position, part), expected in zip(STEPS, local(directory, STEPS), strict=True):
            assert np.array_equal(rows(await session.step(part, position, "all")), expected)
        assert (session.length, session.replays) == (16, 0)

    play(directory, scene)


def test_only_the_last_row_comes_where_only_that_is_wanted(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        found = rows(await stage.open().step(STEPS[0][1], 0, "last"))
        assert np.array_equal(found, local(directory, STEPS[:1])[0][-1:])

    play(directory, scene)


def test_a_step_goes_in_windows_that_the_credits_allow(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.second.door.window_bytes = 4 * WIDTH * 4  # four tokens under way at once
        stage.second.door.windows = 2
        session = stage.open()
        assert len(rows(await session.step(states(30), 0, "all"))) == 30
        assert stage.second.hops.statistics().windows_done >= 8
        assert len(rows(await session.step(states(30), 30, "last"))) == 1

    play(directory, scene)


@pytest.mark.parametrize("step", range(len(STEPS)))
@pytest.mark.parametrize("when", ["before", "under way"])
def test_a_server_that_vanishes_costs_a_replay_and_no_bit(directory: Path, step: int, when: str) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        for index, ((position, part), expected) in enumerate(zip(STEPS, local(directory, STEPS), strict=True)):
            if index == step and when == "before":
                stage.lose_second()
            elif index == step:
                await until(lambda: session.route is not None)
                asyncio.get_running_loop().call_soon(stage.lose_second)
            assert np.array_equal(rows(await session.step(part, position, "all")), expected)
        assert session.replays == 1
        assert session.route is not None and session.route.hops[1].peer == stage.replica.peer

    play(directory, scene)


def test_a_route_lost_between_steps_is_replaced_by_the_next_step_only(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        await session.step(STEPS[0][1], 0, "all")
        stage.lose_second()
        await until(lambda: bool(stage.plans.blamed))
        asked = stage.plans.asked
        for _ in range(20):
            await asyncio.sleep(0)
        assert stage.plans.asked == asked
        found = await session.step(STEPS[1][1], 9, "all")
        assert np.array_equal(rows(found), local(directory, STEPS)[1])

    play(directory, scene)


def test_a_position_before_the_end_rolls_back_and_a_replay_goes_the_same_way(directory: Path) -> None:
    steps = [(0, states(9)), (9, states(3, 1)), (5, states(2, 2)), (7, states(1, 3))]

    async def scene(stage: Scene) -> None:
        session = stage.open()
        for index, ((position, part), expected) in enumerate(zip(steps, local(directory, steps), strict=True)):
            if index == 3:
                stage.lose_second()
            assert np.array_equal(rows(await session.step(part, position, "all")), expected)
        assert (session.length, session.replays) == (8, 1)

    play(directory, scene)


def test_a_step_said_again_is_computed_again(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        once = rows(await session.step(STEPS[0][1], 0, "all"))
        assert np.array_equal(rows(await session.step(STEPS[0][1], 0, "all")), once)
        assert session.length == 9

    play(directory, scene)


def test_rolling_back_for_ever_keeps_a_bounded_journal(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        for position in range(20):
            await session.step(states(30, position), position, "last")
        assert stage.sessions.journals.used_bytes <= 2 * MOST * WIDTH * 4
        await session.step(states(1), 3, "last")
        assert session.length == 4

    play(directory, scene)


def test_what_does_not_fit_is_refused_and_changes_nothing(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        await session.step(states(5), 0, "last")
        with pytest.raises(SessionConflict, match="5 tokens") as caught:
            await session.step(states(1), 6, "last")
        assert caught.value.length == 5
        with pytest.raises(SessionConflict, match="64 tokens"):
            await session.step(states(60), 5, "last")
        first = asyncio.ensure_future(session.step(states(1), 5, "last"))
        await asyncio.sleep(0)
        with pytest.raises(SessionConflict, match="under way"):
            await session.step(states(1), 5, "last")
        await first
        stage.sessions.journals.bytes_max = stage.sessions.journals.used_bytes
        with pytest.raises(SessionsFull):
            await session.step(states(1), 6, "last")
        assert session.length == 6

    play(directory, scene)


def test_a_part_of_the_blocks_can_be_asked_for(directory: Path) -> None:
    steps = STEPS[:2]

    async def scene(stage: Scene) -> None:
        stage.plans.routes = [route(stage.first.hop(1, 2), stage.second.hop(2, 3))]
        session = stage.open(Span(1, 3))
        for (position, part), expected in zip(steps, local(directory, steps, 1, 3), strict=True):
            assert np.array_equal(rows(await session.step(part, position, "all")), expected)

    play(directory, scene)


@pytest.mark.parametrize("lost", [False, True])
def test_deep_prompts_come_to_their_blocks_on_every_route(directory: Path, lost: bool) -> None:
    prompts = deep_prompts(4)

    async def scene(stage: Scene) -> None:
        session = stage.open(prompts=prompts)
        answers = []
        for position, part in STEPS:
            answers.append(rows(await session.step(part, position, "all")))
            if lost and position == 9:
                stage.lose_second()
        for found, expected in zip(answers, local(directory, STEPS, prompts=prompts), strict=True):
            assert np.array_equal(found, expected)
        assert not np.array_equal(answers[1], local(directory, STEPS)[1])
        assert session.replays == lost

    play(directory, scene)


def test_deep_prompts_of_a_part_of_the_blocks_are_those_of_its_blocks(directory: Path) -> None:
    steps, prompts = STEPS[:2], deep_prompts(2)

    async def scene(stage: Scene) -> None:
        stage.plans.routes = [route(stage.first.hop(1, 2), stage.second.hop(2, 3))]
        session = stage.open(Span(1, 3), prompts=prompts)
        for (position, part), expected in zip(steps, local(directory, steps, 1, 3, prompts), strict=True):
            assert np.array_equal(rows(await session.step(part, position, "all")), expected)

    play(directory, scene)


def test_deep_prompts_take_of_the_room_for_journals(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        prompts = deep_prompts(4)
        stage.sessions.journals.bytes_max = 2 * prompts.size_bytes
        first, _ = stage.open(prompts=prompts), stage.open(prompts=prompts)
        with pytest.raises(SessionsFull):
            stage.open(prompts=prompts)
        assert len(stage.sessions.running()) == 2
        first.close()
        stage.open(prompts=prompts)

    play(directory, scene)


def test_a_step_without_servers_fails_and_may_be_tried_again(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        routes, stage.plans.routes = stage.plans.routes, []
        session = stage.open(wait_s=0.1)
        with pytest.raises(PeerdError, match="nobody serves"):
            await session.step(STEPS[0][1], 0, "all")
        stage.plans.routes = routes
        found = await session.step(STEPS[0][1], 0, "all")
        assert np.array_equal(rows(found), local(directory, STEPS[:1])[0])

    play(directory, scene)


def test_a_cancelled_step_leaves_a_session_that_goes_on(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        session = stage.open()
        await session.step(STEPS[0][1], 0, "all")
        task = asyncio.ensure_future(session.step(STEPS[3][1], 9, "all"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.length == 9
        assert np.array_equal(rows(await session.step(STEPS[1][1], 9, "all")), local(directory, STEPS)[1])

    play(directory, scene)


def test_an_idle_session_expires_and_frees_its_hops(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_sessions, "IDLE_S", 0.2)

    async def scene(stage: Scene) -> None:
        session = stage.open()
        await session.step(STEPS[0][1], 0, "all")
        await until(lambda: session.closed)
        await until(lambda: stage.served == 0)
        with pytest.raises(UnknownSession):
            stage.sessions.get(session.session.hex())
        with pytest.raises(UnknownSession):
            await session.step(STEPS[1][1], 9, "all")

    play(directory, scene)


def test_closing_ends_the_step_under_way(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.plans.routes, stage.plans.error = [], DialError("nobody yet")
        session = stage.open()
        task = asyncio.ensure_future(session.step(STEPS[0][1], 0, "all"))
        await asyncio.sleep(0)
        stage.sessions.close_all(Stopping("the daemon stops"))
        with pytest.raises(Stopping):
            await task

    play(directory, scene)


def test_there_are_not_more_sessions_than_the_limit(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_sessions, "SESSIONS_MAX", 2)

    async def scene(stage: Scene) -> None:
        first, _ = stage.open(), stage.open()
        with pytest.raises(SessionsFull):
            stage.open()
        first.close()
        stage.open()

    play(directory, scene)


def test_the_room_for_journals_is_counted() -> None:
    room = JournalRoom(100)
    room.take(60)
    with pytest.raises(SessionsFull):
        room.take(41)
    room.give_back(20)
    room.take(60)
    assert room.used_bytes == 100
