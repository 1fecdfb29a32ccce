"""Sessions through real nodes, tiny real models: exact tokens, whatever happens to the route."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy
import pytest

from blocks.model.exact import Generated, Reference, route_generator
from blocks.model.head import load_head
from blocks.model.source import resolve
from blocks.model.span import load_span
from blocks.protocol.session_errors import SessionFault
from blocks.sampling_params import SamplingParams
from overlay.errors import Blame, DialError, PeerdError
from peerd.decoding import Decode, DecodeRequest, DecoderPool
from routing.types import Hop
from tests.models import make_tiny
from tests.ring import Listener, Plans, Ring, route, until

PROMPT = tuple(range(40, 61))
NEW = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(directory: Path) -> Generated:
    return Reference.load(str(directory)).generate(PROMPT, NEW)


def request(**changes: object) -> DecodeRequest:
    fields = {"prompt": PROMPT, "params": SamplingParams(), "max_new_tokens": NEW, "wait_s": 10.0} | changes
    return DecodeRequest(**fields)  # type: ignore[arg-type]


class Scene:
    """Two servers, a replica of the second, and a driver that serves nothing."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    async def build(self) -> None:
        self.first = await self.ring.node(0, 2)
        self.second = await self.ring.node(2, 4)
        self.replica = await self.ring.node(2, 4)
        self.driver = await self.ring.node(drives=True)
        routes = [route(self.first.hop(), node.hop()) for node in (self.second, self.replica)]
        self.plans = Plans(routes)
        self.pool: DecoderPool = await self.ring.pool(self.driver, self.plans)

    def start(self, listener: Listener, **changes: object) -> Decode:
        return self.pool.start(self.ring.model(), request(**changes), listener)

    @property
    def sessions(self) -> int:
        return sum(node.hops.session_count for node in self.ring.nodes)


def play(directory: Path, scene: Callable[[Scene], Awaitable[None]], *, threads: bool = False) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), Ring(directory, threads=threads) as ring:
            stage = Scene(ring)
            await stage.build()
            await scene(stage)

    asyncio.run(main())


async def run(scene: Scene, listener: Listener, **changes: object) -> Decode:
    decode = scene.start(listener, **changes)
    await listener.ended()
    return decode


@pytest.mark.parametrize("threads", [False, True])
def test_two_servers_give_the_tokens_of_the_whole_model(directory: Path, expected: Generated, threads: bool) -> None:
    async def scene(stage: Scene) -> None:
        listener = Listener()
        decode = await run(stage, listener)
        assert (listener.tokens, listener.ends) == (expected.tokens, [("length", None)])
        assert (decode.output, decode.replays, listener.waits) == (expected.tokens, 0, [])
        assert decode.tokens_per_s() is not None
        await until(lambda: stage.sessions == 0)
        assert stage.first.door.leases == []

    play(directory, scene, threads=threads)


def test_logits_come_along_when_asked_for_and_are_those_of_spans_without_a_network(directory: Path) -> None:
    source = resolve(str(directory))
    spans = [load_span(source, start, start + 2, prepare_steps=False) for start in (0, 2)]
    local = route_generator(load_head(source), spans)(PROMPT, NEW)

    async def scene(stage: Scene) -> None:
        listener = Listener()
        await run(stage, listener, want_logits=True)
        assert local.logits is not None
        for part, row in zip(listener.logits, local.logits, strict=True):
            assert part is not None
            assert numpy.array_equal(numpy.frombuffer(part.data, numpy.float32), row.numpy())

    play(directory, scene)


def test_a_prompt_goes_in_chunks_that_the_credits_allow(directory: Path, expected: Generated) -> None:
    async def scene(stage: Scene) -> None:
        stage.second.door.window_bytes = 4 * 32 * 4  # four tokens under way at once
        stage.second.door.windows = 2
        listener = Listener()
        await run(stage, listener)
        assert listener.tokens == expected.tokens
        assert stage.second.hops.statistics().windows_done >= len(PROMPT) // 4 + NEW - 1

    play(directory, scene)


@pytest.mark.parametrize("token", range(1, NEW))
def test_a_server_that_vanishes_at_any_token_costs_a_replay_and_nothing_else(
    directory: Path, expected: Generated, token: int
) -> None:
    async def scene(stage: Scene) -> None:
        listener = Listener(lambda count: stage.second.vanish() if count == token else None)
        decode = await run(stage, listener)
        assert (listener.tokens, listener.ends) == (expected.tokens, [("length", None)])
        assert decode.replays == 1
        assert listener.waits[0] == "replaying"
        assert stage.plans.blamed

    play(directory, scene)


def test_sampled_text_is_the_same_after_a_loss(directory: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.1, presence_penalty=0.5)

    async def scene(stage: Scene) -> None:
        whole, broken = Listener(), Listener(lambda count: stage.second.vanish() if count == 7 else None)
        await run(stage, whole, params=params)
        decode = await run(stage, broken, params=params)
        assert (broken.tokens, decode.replays) == (whole.tokens, 1)

    play(directory, scene)


def test_a_server_that_leaves_is_left_at_the_next_token_without_blame(directory: Path, expected: Generated) -> None:
    async def scene(stage: Scene) -> None:
        drains: list[asyncio.Task[None]] = []

        def leave(count: int) -> None:
            if count == 5:
                drains.append(asyncio.get_running_loop().create_task(stage.second.service.drain(20)))

        listener = Listener(leave)
        decode = await run(stage, listener, max_new_tokens=NEW)
        await drains[0]
        assert (listener.tokens, stage.plans.blamed) == (expected.tokens, [])
        assert decode.replays <= 1
        assert stage.second.hops.session_count == 0

    play(directory, scene)


def test_a_busy_server_is_waited_for_without_blame(directory: Path, expected: Generated) -> None:
    async def scene(stage: Scene) -> None:
        stage.second.door.refuse_times = stage.replica.door.refuse_times = 1
        listener = Listener()
        await run(stage, listener)
        assert (listener.tokens, stage.plans.blamed) == (expected.tokens, [])
        assert listener.waits

    play(directory, scene)


def test_a_server_that_stays_busy_is_an_error_after_the_wait_and_not_before(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.second.door.refuse_times = stage.replica.door.refuse_times = 1 << 30
        listener = Listener()
        started = asyncio.get_running_loop().time()
        await run(stage, listener, wait_s=0.6)
        [(reason, error)] = listener.ends
        assert reason == "error"
        assert error is not None
        assert 0.6 <= asyncio.get_running_loop().time() - started < 10
        assert stage.plans.asked < 30

    play(directory, scene)


def test_a_driver_whose_own_hop_refuses_does_not_spin(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        own = await stage.ring.node(0, 4, drives=True)
        own.door.refuse_times = 1 << 30
        plans = Plans([route(own.hop())])
        pool = await stage.ring.pool(own, plans)
        listener = Listener()
        pool.start(stage.ring.model(), request(wait_s=0.6), listener)
        assert await listener.ended() == "error"
        assert plans.asked < 12

    play(directory, scene)


class Unserved(PeerdError):
    code = "blocks-unserved"
    retryable = False
    blame = Blame.NETWORK


def test_blocks_that_nobody_serves_are_an_error_at_once(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.plans.routes, stage.plans.error = [], Unserved("nobody serves blocks 0:4")
        listener = Listener()
        await run(stage, listener)
        assert [(reason, error and error.code) for reason, error in listener.ends] == [("error", "blocks-unserved")]
        assert listener.waits == []

    play(directory, scene)


def test_blocks_that_are_joining_are_waited_for(directory: Path, expected: Generated) -> None:
    async def scene(stage: Scene) -> None:
        routes, stage.plans.routes = stage.plans.routes, []
        stage.plans.error = SessionFault("busy", "blocks 2:4 are joining")
        listener = Listener()
        stage.start(listener)
        await until(lambda: listener.waits == ["waiting"])
        stage.plans.routes = routes
        assert await listener.ended() == "length"
        assert listener.tokens == expected.tokens

    play(directory, scene)


def test_a_cancelled_decode_frees_every_hop_and_says_so_once(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        listener = Listener(lambda count: decode.cancel() if count == 4 else None)
        decode = stage.start(listener, max_new_tokens=100)
        assert await listener.ended() == "cancelled"
        decode.cancel()
        assert (len(listener.tokens), len(listener.ends)) == (4, 1)
        await until(lambda: stage.sessions == 0, timeout_s=1)
        assert stage.pool.running() == ()
        assert [node.door.leases for node in stage.ring.nodes] == [[], [], [], []]

    play(directory, scene)


def test_a_decode_can_be_cancelled_while_it_waits_for_servers(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        stage.plans.routes, stage.plans.error = [], DialError("nobody yet")
        listener = Listener()
        decode = stage.start(listener, wait_s=1000.0)
        await until(lambda: bool(listener.waits))
        decode.cancel()
        assert listener.ends == [("cancelled", None)]

    play(directory, scene)


def test_a_listener_or_a_stop_token_ends_the_text(directory: Path, expected: Generated) -> None:
    stop = expected.tokens[5]
    until_stop = expected.tokens[: expected.tokens.index(stop) + 1]

    async def scene(stage: Scene) -> None:
        listener = Listener(lambda count: count < 3)
        await run(stage, listener)
        assert (listener.tokens, listener.ends) == (expected.tokens[:3], [("stop", None)])
        listener = Listener()
        await run(stage, listener, stop_tokens=(stop,))
        assert (listener.tokens, listener.ends) == (until_stop, [("stop", None)])
        listener = Listener()
        await run(stage, listener, stop_tokens=(stop,), ignore_eos=True)
        assert (listener.tokens, listener.ends) == (expected.tokens, [("length", None)])

    play(directory, scene)


@pytest.mark.parametrize("shape", ["alone", "first", "last", "both ends", "twice in a row"])
def test_a_driver_can_be_on_its_own_route(directory: Path, expected: Generated, shape: str) -> None:
    async def scene(stage: Scene) -> None:
        own = await stage.ring.node(0, 4, drives=True)

        def mine(start: int, end: int) -> Hop:
            return own.hop(start, end)

        routes = {
            "alone": route(mine(0, 4)),
            "first": route(mine(0, 2), stage.second.hop()),
            "last": route(stage.first.hop(), mine(2, 4)),
            "both ends": route(mine(0, 1), stage.first.hop(1, 2), mine(2, 4)),
            "twice in a row": route(mine(0, 2), mine(2, 4)),
        }
        pool = await stage.ring.pool(own, Plans([routes[shape]]))
        listener = Listener()
        pool.start(stage.ring.model(), request(), listener)
        assert await listener.ended() == "length"
        assert listener.tokens == expected.tokens
        await until(lambda: stage.sessions == 0)

    play(directory, scene)


def test_many_sessions_at_once_keep_apart(directory: Path, expected: Generated) -> None:
    async def scene(stage: Scene) -> None:
        listeners = [Listener() for _ in range(6)]
        for listener in listeners:
            stage.start(listener)
        for listener in listeners:
            await listener.ended()
        assert [listener.tokens for listener in listeners] == [expected.tokens] * 6
        await until(lambda: stage.sessions == 0)

    play(directory, scene, threads=True)


def test_a_pool_that_closes_cancels_what_runs(directory: Path) -> None:
    listener = Listener()

    async def scene(stage: Scene) -> None:
        stage.start(listener, max_new_tokens=100)
        await until(lambda: len(listener.tokens) > 2)

    play(directory, scene)
    assert listener.ends == [("cancelled", None)]


def test_an_empty_prompt_is_refused_where_it_is_made(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        with pytest.raises(ValueError, match="prompt"):
            stage.start(Listener(), prompt=())
        assert stage.pool.running() == ()

    play(directory, scene)
