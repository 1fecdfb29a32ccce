"""The serving shell between real hosts: what strangers and broken peers send, draining, and what is freed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blocks.engine.inline import InlineDevice
from blocks.model.exact import Reference
from blocks.protocol.device import LeaseKey
from blocks.sampling_params import SamplingParams
from blocks.service import DATA_PROTOCOL, SESSION_PROTOCOL
from overlay.errors import PeerdError
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part
from peerd.decoding import DecodeRequest
from tests.models import make_tiny
from tests.ring import Listener, Node, Plans, Ring, route, until

PROMPT, NEW = tuple(range(9, 20)), 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[int]:
    return Reference.load(str(directory)).greedy(PROMPT, NEW)


class Scene:
    """One server of the whole model, a driver, and a stranger."""

    async def build(self, ring: Ring) -> None:
        self.ring = ring
        self.server = await ring.node(0, 4)
        self.driver = await ring.node(drives=True)
        self.stranger = await ring.node()
        self.plans = Plans([route(self.server.hop())])
        self.pool = await ring.pool(self.driver, self.plans)

    async def decode(self, on_count: Callable[[int], bool | None] | None = None) -> Listener:
        listener = Listener(on_count)
        self.pool.start(self.ring.model(), DecodeRequest(PROMPT, SamplingParams(), NEW, wait_s=5.0), listener)
        await listener.ended()
        return listener


def play(directory: Path, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), Ring(directory) as ring:
            stage = Scene()
            await stage.build(ring)
            await scene(stage)

    asyncio.run(main())


class Ears:
    """A receiver that remembers."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.lost: list[PeerdError | None] = []

    def message_received(self, message: Message) -> None:
        self.heard.append(message)

    def channel_lost(self, error: PeerdError | None) -> None:
        self.lost.append(error)


async def channel(sender: Node, receiver: Node, protocol: str) -> tuple[MessageChannel, Ears]:
    stream = await sender.host.open_stream(receiver.host.peer_id, protocol, addresses=receiver.host.addresses)
    lane, ears = MessageChannel(stream, sender.host.identity), Ears()
    lane.set_receiver(ears)
    return lane, ears


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, DATA_PROTOCOL])
@pytest.mark.parametrize(
    "garbage", [bytes(64), b"\xff" * 512, b"\x01\x00\x00\x10" + b"\xff" * 60], ids=["zeros", "ones", "parts"]
)
def test_garbage_ends_its_own_stream_and_others_are_served(
    directory: Path, expected: list[int], protocol: str, garbage: bytes
) -> None:
    async def scene(stage: Scene) -> None:
        stream = await stage.stranger.host.open_stream(
            stage.server.host.peer_id, protocol, addresses=stage.server.host.addresses
        )
        ears = Ears()
        MessageChannel(stream, stage.stranger.host.identity).set_receiver(ears)
        stream.write_nowait(garbage)
        await until(lambda: ears.lost != [])
        assert (await stage.decode()).tokens == expected

    play(directory, scene)


@pytest.mark.parametrize("protocol", [SESSION_PROTOCOL, DATA_PROTOCOL])
def test_a_message_that_makes_no_sense_ends_its_own_stream(directory: Path, expected: list[int], protocol: str) -> None:
    async def scene(stage: Scene) -> None:
        lane, ears = await channel(stage.stranger, stage.server, protocol)
        lane.send(Message("window", {"s": "no id", "e": -1}))
        await until(lambda: ears.lost != [])
        assert stage.server.hops.statistics().refused
        assert (await stage.decode()).tokens == expected

    play(directory, scene)


def test_a_stranger_cannot_enter_a_session(directory: Path, expected: list[int]) -> None:
    """A copy of the driver's own window, sent by somebody else, changes nothing."""

    async def scene(stage: Scene) -> None:
        seen: list[Message] = []
        take = stage.server.service.data_received

        def listen(message: Message, lane: object) -> None:
            seen.append(message)
            take(message, lane)  # type: ignore[arg-type]

        stage.server.service.data_received = listen  # type: ignore[method-assign, assignment]
        lane, ears = await channel(stage.stranger, stage.server, DATA_PROTOCOL)

        def intrude(count: int) -> None:
            if count == 3:
                header = dict(seen[-1].header)
                wrong = Part("hidden", "float32", (1, 32), bytes(128))
                lane.send(Message("window", {**header, "n": header["n"] + 1, "o": header["o"] + 1}, (wrong,)))

        listener = await stage.decode(intrude)
        assert listener.tokens == expected
        await until(lambda: ears.lost != [])

    play(directory, scene)


def test_an_output_does_not_leave_when_its_input_was_not_signed_by_its_sender(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        take = stage.server.service.data_received

        def tamper(message: Message, lane: object) -> None:
            if message.kind == "window" and message.header["c"] == 1:
                signature = message.signature or b""
                message = replace(message, signature=bytes([signature[0] ^ 1]) + signature[1:])
            take(message, lane)  # type: ignore[arg-type]

        stage.server.service.data_received = tamper  # type: ignore[method-assign, assignment]
        listener = Listener()
        request = DecodeRequest(PROMPT, SamplingParams(), NEW, wait_s=0.3)
        stage.pool.start(stage.ring.model(), request, listener)
        await until(lambda: bool(listener.waits))
        assert len(listener.tokens) == 1  # the prompt's; the next token's window was false
        assert dict(stage.server.hops.statistics().refused)

    play(directory, scene)


def test_draining_ends_when_the_last_session_has_gone(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        await stage.decode()
        await until(lambda: stage.server.hops.session_count == 0)
        await stage.server.service.drain(10)
        listener = Listener()
        stage.pool.start(stage.ring.model(), DecodeRequest(PROMPT, SamplingParams(), NEW, wait_s=0.3), listener)
        assert await listener.ended() == "error"
        assert stage.plans.blamed == []

    play(directory, scene)


def test_a_session_leaves_nothing_behind(directory: Path) -> None:
    async def scene(stage: Scene) -> None:
        for _ in range(3):
            await stage.decode()
        server, driver = stage.server, stage.driver
        await until(lambda: server.hops.session_count == 0 and len(driver.directory) == 0)
        assert server.door.leases == []
        device = server.device
        assert isinstance(device, InlineDevice)
        await until(lambda: device.runner.cache_count == 0)
        await until(lambda: not server.service._edges)

    play(directory, scene)


def test_every_window_tells_which_lease_works(directory: Path) -> None:
    used: list[LeaseKey] = []

    async def scene(stage: Scene) -> None:
        stage.server.service._lease_used = used.append
        await stage.decode()

    play(directory, scene)
    assert len(used) == NEW
    assert len(set(used)) == 1
