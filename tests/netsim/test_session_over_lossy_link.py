"""The real driver, hops, Noise, yamux and messages over in-memory links that break mid-decode: the same tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from blocks.protocol.admission import Grant, Wish
from blocks.protocol.device import LeaseKey
from blocks.protocol.hops import Hops, HopSettings
from blocks.sampling_params import SamplingParams
from blocks.service import SpanService
from blocks.session_directory import SessionDirectory
from netsim.arithmetic import Arithmetic, ArithmeticRunner
from netsim.compute import DEVICES
from netsim.devices import SimDevice
from netsim.fabric import Path
from netsim.loop import run
from netsim.ports import SimRandomness
from overlay.errors import PeerdError
from overlay.host import Host
from overlay.identity import Identity
from overlay.multiaddr import tcp_address
from overlay.rpc.types import Part
from peerd.decoding import Decode, DecodeRequest, DecoderPool, DriverModel
from routing.types import ComputeClass, Hop, ModelId, Route, Span
from tests.netsim.small_network import Lines, SmallNetwork

MODEL, KEY = Arithmetic(6, 1), "arithmetic"
MODEL_ID, CLASS = ModelId(b"m" * 32), ComputeClass("none", "float32")
PROMPT, NEW_TOKENS = tuple(range(3, 40)), 24
DRIVER = "10.0.0.9"
SERVERS = {"10.0.0.1": Span(0, 2), "10.0.0.2": Span(2, 4), "10.0.0.3": Span(4, 6), "10.0.0.4": Span(2, 4)}


def arithmetic_device() -> SimDevice:
    """Blocks and head of the exact model, on one machine."""
    runner = ArithmeticRunner(MODEL)
    runner.install_span(KEY, Span(0, MODEL.blocks))
    runner.install_head(KEY)
    made = SimDevice(DEVICES["home-gpu"], runner)
    made.start()
    return made


def expected() -> list[int]:
    """The tokens of the whole model in one place, without any of the machinery."""
    return MODEL.generate(PROMPT, NEW_TOKENS)


class OpenDoor:
    """Admission without a budget."""

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        return Grant(KEY, 4, 256, 1 << 20, 1, "float32")

    def release(self, lease: LeaseKey) -> None:
        """Nothing is counted."""


class FixedPlanner:
    """The first server of each span that isn't to be avoided."""

    def __init__(self, hops: list[Hop], trace: Lines) -> None:
        self._hops = hops
        self._trace = trace
        self.blamed: list[str] = []

    def plan(
        self, model: ModelId, compute_class: ComputeClass, avoid: Sequence[bytes], span: Span | None = None
    ) -> Route:
        route: list[Hop] = []
        for start in (0, 2, 4):
            serving = [hop for hop in self._hops if hop.span.start == start]
            route.append(next((hop for hop in serving if hop.peer not in avoid), serving[0]))
        return Route(tuple(route))

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        self.blamed.append(error.code)
        self._trace.add("blame", "", error.code)

    def praise(self, peers: Sequence[bytes]) -> None:
        """Nothing is held against anybody here."""

    async def wait_changed(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


@dataclass
class Listener:
    """Hears the decode; `at_token` is called with each count of tokens."""

    trace: Lines
    at_token: Callable[[int], None]
    over: asyncio.Event
    count: int = 0
    reason: str = ""

    def on_token(self, token: int, logits: Part | None) -> bool:
        self.count += 1
        self.trace.add("token", "", str(token))
        self.at_token(self.count)
        return True

    def on_waiting(self, reason: str, error: PeerdError | None) -> None:
        self.trace.add("waiting", "", f"{reason} {error and error.code}")

    def on_end(self, reason: str, error: PeerdError | None) -> None:
        self.reason = reason
        self.over.set()


@dataclass(frozen=True)
class Story:
    """What came of one run."""

    tokens: list[int]
    reason: str
    replays: int
    trace: str
    took_s: float
    left_sessions: int


async def start_node(
    stack: AsyncExitStack, network: SmallNetwork, address: str, seed: int
) -> tuple[Host, SpanService, Hops, SessionDirectory, SimDevice]:
    ports = network.ports(address, seed)
    host = await stack.enter_async_context(Host(Identity(ports.randomness.token(32)), ports))
    await host.listen(tcp_address(address, 4001))
    device, directory = arithmetic_device(), SessionDirectory()
    hops = Hops(HopSettings(host.peer_id.multihash, ports.randomness.token(16)), OpenDoor(), device)
    service = await stack.enter_async_context(SpanService(host, device, hops, directory, ports.clock))
    return host, service, hops, directory, device


Fault = Callable[[SmallNetwork, int], None]


async def decode(fault: Fault, seed: int = 1, path: Path | None = None) -> Story:
    trace = Lines()
    network = SmallNetwork(trace, path or Path(delay_s=0.01))
    async with asyncio.timeout(300), AsyncExitStack() as stack:
        served: list[Hop] = []
        all_hops: list[Hops] = []
        for address, span in SERVERS.items():
            host, _, hops, _, _ = await start_node(stack, network, address, seed)
            served.append(Hop(host.peer_id.multihash, (f"/ip4/{address}/tcp/4001",), span))
            all_hops.append(hops)
        host, service, _, directory, device = await start_node(stack, network, DRIVER, seed)
        planner = FixedPlanner(served, trace)
        clock = host.ports.clock
        pool = DecoderPool(host, service, directory, device, planner, clock, SimRandomness(f"{seed} sessions"), 1)
        await stack.enter_async_context(pool)
        over = asyncio.Event()
        listener = Listener(trace, lambda count: fault(network, count), over)
        model = DriverModel(KEY, MODEL_ID, CLASS, 1, 1024)
        started = clock.now()
        running: Decode = pool.start(model, DecodeRequest(PROMPT, SamplingParams(), NEW_TOKENS), listener)
        await over.wait()
        took_s = clock.now() - started
        await asyncio.sleep(1)
        left = sum(hops.session_count for hops in all_hops)
        return Story(running.output, listener.reason, running.replays, "\n".join(trace.lines), took_s, left)


def nothing(network: SmallNetwork, count: int) -> None:
    """No fault."""


def kill_at(token: int, address: str) -> Fault:
    return lambda network, count: network.kill(address) if count == token else None


def cut_at(token: int, one: str, other: str) -> Fault:
    return lambda network, count: network.cut(one, other) if count == token else None


def test_without_a_loss_the_ring_gives_the_tokens_of_the_whole_model_and_frees_every_hop() -> None:
    story = run(decode(nothing))
    assert (story.tokens, story.reason, story.replays) == (expected(), "length", 0)
    assert story.left_sessions == 0


@pytest.mark.parametrize("token", [1, 7, 23])
def test_a_server_that_vanishes_mid_decode_costs_a_replay_and_no_token(token: int) -> None:
    story = run(decode(kill_at(token, "10.0.0.2")))
    assert (story.tokens, story.reason) == (expected(), "length")
    assert story.replays >= 1


def test_a_link_between_two_hops_that_is_cut_costs_a_replay_and_no_token() -> None:
    story = run(decode(cut_at(9, "10.0.0.1", "10.0.0.2")))
    assert (story.tokens, story.reason) == (expected(), "length")
    assert story.replays >= 1


@pytest.mark.parametrize("byte", [200, 3000, 6007])
def test_a_link_that_breaks_at_a_byte_costs_no_token(byte: int) -> None:
    def fault(network: SmallNetwork, count: int) -> None:
        if count == 1:
            network.cut_after("10.0.0.1", "10.0.0.2", byte)

    story = run(decode(fault))
    assert (story.tokens, story.reason) == (expected(), "length")


def test_a_server_behind_a_black_hole_is_noticed_by_its_silence() -> None:
    def fault(network: SmallNetwork, count: int) -> None:
        if count == 5:
            for other in (DRIVER, "10.0.0.1", "10.0.0.3"):
                network.set_path("10.0.0.2", other, Path(is_black_hole=True))

    story = run(decode(fault))
    assert (story.tokens, story.reason) == (expected(), "length")
    assert story.replays >= 1
    assert story.took_s < 15


@pytest.mark.parametrize("fault", [nothing, kill_at(5, "10.0.0.2")])
def test_the_same_seed_tells_the_same_story_twice(fault: Fault) -> None:
    assert run(decode(fault, seed=3)) == run(decode(fault, seed=3))


def test_a_listener_hears_nothing_of_the_machinery(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(decode(kill_at(3, "10.0.0.2")))
    assert [record.getMessage() for record in caplog.records] == []
