"""The real caller, servers, Noise, yamux and messages over in-memory links: whatever is lost, and wherever, the gradients are the same.

The device is exact arithmetic, so that "the same" is equality with a loop over the whole model. Virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

from blocks.call_service import CallService
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import Offer, batch_rows, rows_of
from blocks.protocol.device import BackwardJob, Batch, ForwardJob, Job, JobResult
from blocks.protocol.part_lists import joined, summed
from netsim.fabric import Path
from netsim.loop import run
from netsim.ports import SimClock, SimRandomness
from overlay.errors import PeerdError
from overlay.host import Host
from overlay.identity import Identity
from overlay.multiaddr import tcp_address
from overlay.rpc.types import Part
from peerd.calls import caller as caller_module
from peerd.calls.caller import BatchCaller, Gradients
from peerd.driving import DriverModel
from peerd.in_order import in_order
from peerd.training import limits
from routing.records import SpanRecord, State
from routing.types import ComputeClass, ModelId, Span
from tests.netsim.small_network import Lines, SmallNetwork
from tests.peerd.calls.swarm import Swarm

MODEL, CLASS = ModelId(b"m" * 32), ComputeClass("none", "float32")
BLOCKS, WIDTH, ROWS, TOKENS, LENGTH = 4, 3, 6, 4, 2
WHOLE = Span(0, BLOCKS)
MODULUS = 251
DRIVER, LEFT, RIGHT, SPARE = "10.0.0.9", "10.0.0.1", "10.0.0.2", "10.0.0.3"
SERVERS = {LEFT: Span(0, 2), RIGHT: Span(2, 4), SPARE: WHOLE}
JOB_S = 0.05
POSITIONS_OF_A_CUT = 24


# --- a model that is exact ---


def part(name: str, values: np.ndarray) -> Part:
    return Part(name, "float32", values.shape, values.astype(np.float32).tobytes())


def array(given: Part | None) -> np.ndarray:
    assert given is not None
    return np.frombuffer(given.data, np.float32).reshape(given.shape).astype(np.int64)


def entering(hidden: np.ndarray, prompts: np.ndarray, index: int) -> np.ndarray:
    """A block's input: the state with the block's prompt added to its first tokens."""
    added = hidden.copy()
    added[:, :LENGTH] += prompts[index]
    return added


def forward(blocks: range, hidden: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    for index, block in enumerate(blocks):
        hidden = (entering(hidden, prompts, index) * (block + 3) + 7) % MODULUS
    return hidden


def backward(blocks: range, hidden: np.ndarray, prompts: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depends on every block's input, as a gradient does: a wrong recomputation shows."""
    inputs = []
    for index, block in enumerate(blocks):
        inputs.append(entering(hidden, prompts, index))
        hidden = (inputs[-1] * (block + 3) + 7) % MODULUS
    of_prompts = np.zeros_like(prompts)
    for index, block in reversed(list(enumerate(blocks))):
        grad = (grad * (block + 5) + inputs[index]) % MODULUS
        of_prompts[index] = grad[:, :LENGTH].sum(axis=0)
    return grad, of_prompts


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODULUS, shape)


HIDDEN = numbers(ROWS, TOKENS, WIDTH, seed=1)
PROMPTS = numbers(BLOCKS, LENGTH, WIDTH, seed=2)
GRAD = numbers(ROWS, TOKENS, WIDTH, seed=3)


class ArithmeticDevice:
    """A `Device` for calls; each job takes `JOB_S` of virtual time. ``on_job`` hears of each when it comes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.step_count = self.queue_depth = 0
        self.jobs: list[Job] = []
        self.times: list[tuple[str, float]] = []
        self._free_at = 0.0
        self.on_job: Callable[[ArithmeticDevice], None] = lambda device: None

    def submit(self, jobs: Sequence[Job], done: Callable[[JobResult], None]) -> None:
        loop = asyncio.get_running_loop()
        for job in jobs:
            self.jobs.append(job)
            self.on_job(self)
            begins = max(loop.time(), self._free_at)
            self._free_at = begins + JOB_S
            self.times.append((type(job).__name__, begins))
            loop.call_at(self._free_at, self._finish, job, done)

    def _finish(self, job: Job, done: Callable[[JobResult], None]) -> None:
        self.step_count += 1
        assert isinstance(job, ForwardJob | BackwardJob)
        blocks = range(job.span.start, job.span.end)
        hidden, prompts = array(job.batch.hidden), array(job.batch.prompts)
        if isinstance(job, ForwardJob):
            done(JobResult(job, part("hidden", forward(blocks, hidden, prompts))))
            return
        grad, of_prompts = backward(blocks, hidden, prompts, array(job.grad))
        done(JobResult(job, part("hidden", grad), prompts=part("prompts", of_prompts)))


# --- machines on links: the one place that knows today's links ---


async def machine(stack: AsyncExitStack, network: SmallNetwork, address: str) -> Host:
    ports = network.ports(address)
    host = await stack.enter_async_context(Host(Identity(ports.randomness.token(32)), ports))
    await host.listen(tcp_address(address, 4001))
    return host


def freeze(network: SmallNetwork, address: str) -> None:
    """Nothing leaves the machine and nothing reaches it, without a word."""
    for other in (DRIVER, *SERVERS):
        network.set_path(address, other, Path(is_black_hole=True))
        network.set_path(other, address, Path(is_black_hole=True))


class SwarmWithSpare(Swarm):
    """The spare is found out about when somebody is blamed."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.spares: list[SpanRecord] = []

    def blame(self, peer: bytes, error: PeerdError, edge: bytes | None = None) -> None:
        super().blame(peer, error, edge)
        self.records += self.spares
        self.spares = []


class Counted:
    """Randomness that counts the ids of calls drawn from it: one for each call that is asked."""

    def __init__(self, randomness: SimRandomness) -> None:
        self._randomness = randomness
        self.tokens = 0

    def token(self, length: int) -> bytes:
        self.tokens += 1
        return self._randomness.token(length)

    def uniform(self, low: float, high: float) -> float:
        return self._randomness.uniform(low, high)

    def below(self, bound: int) -> int:
        return self._randomness.below(bound)


@dataclass
class Story:
    """One training step: what came of it."""

    asked: int
    lost: int
    blamed: list[str]
    took_s: float
    trace: list[str]
    jobs: dict[str, list[str]] = field(default_factory=dict)
    times: dict[str, list[tuple[str, float]]] = field(default_factory=dict)


Meddle = Callable[[SmallNetwork, dict[str, ArithmeticDevice]], None]


async def whole_batch(caller: BatchCaller, model: DriverModel, batch: Batch, grad: Part) -> tuple[Part, Gradients]:
    output, tape = await caller.forward(model, WHOLE, batch, keep_tape=True)
    assert tape is not None
    return output, await caller.backward(model, WHOLE, tape, grad)


async def micro_by_micro(caller: BatchCaller, model: DriverModel, batch: Batch, grad: Part) -> tuple[Part, Gradients]:
    """As a job trains: each micro-batch, here one row, goes forward and back, several under way."""

    def learning(start: int) -> Callable[[], Coroutine[Any, Any, tuple[Part, Gradients]]]:
        rows = batch_rows(batch, start, start + 1)
        return lambda: whole_batch(caller, model, rows, rows_of(grad, start, start + 1))

    done = await in_order([learning(start) for start in range(ROWS)], at_once=limits.MICRO_BATCHES_AHEAD)
    prompts = [found.prompts for _, found in done if found.prompts is not None]
    hidden = joined("hidden", [found.hidden for _, found in done])
    return joined("hidden", [output for output, _ in done]), Gradients(hidden, summed("prompts", prompts))


async def step(meddle: Meddle, *, piecewise: bool = False) -> Story:
    """A forward with a tape and a backward, in micro-batches, and all that must hold whatever happens."""
    trace = Lines()
    network = SmallNetwork(trace, Path(delay_s=0.01))
    async with asyncio.timeout(600), AsyncExitStack() as stack:
        swarm, devices, services = SwarmWithSpare(BLOCKS), dict[str, ArithmeticDevice](), list[CallService]()
        clock = SimClock(asyncio.get_running_loop().time)
        for address, span in SERVERS.items():
            host = await machine(stack, network, address)
            device = devices[address] = ArithmeticDevice(address)
            offer = Offer("arithmetic", span, WIDTH, "float32", 64)
            services.append(CallService(host, device, lambda model, named, offer=offer: offer, clock))  # type: ignore[misc]
            peer, where = host.peer_id.multihash, (f"/ip4/{address}/tcp/4001",)
            record = SpanRecord(peer, where, MODEL, span, State.ONLINE, CLASS, prefill_s=0.001)
            (swarm.spares if address == SPARE else swarm.records).append(record)
        driver = await machine(stack, network, DRIVER)
        randomness = Counted(SimRandomness("calls"))
        own = CallService(driver, ArithmeticDevice(DRIVER), serves_nothing, clock)
        caller = BatchCaller(driver, own, swarm, clock, randomness)
        meddle(network, devices)
        started = clock.now()
        model = DriverModel("arithmetic", MODEL, CLASS, WIDTH, 64)
        batch = Batch(part("hidden", HIDDEN), prompts=part("prompts", PROMPTS))
        output, found = await (micro_by_micro if piecewise else whole_batch)(caller, model, batch, part("grad", GRAD))
        took_s = clock.now() - started
        expected, of_prompts = backward(range(BLOCKS), HIDDEN, PROMPTS, GRAD)
        assert np.array_equal(array(output), forward(range(BLOCKS), HIDDEN, PROMPTS))
        assert np.array_equal(array(found.hidden), expected)
        assert np.array_equal(array(found.prompts), of_prompts)
        jobs = {address: [type(job).__name__ for job in device.jobs] for address, device in devices.items()}
        times = {address: device.times for address, device in devices.items()}
        assert sum(map(len, jobs.values())) <= randomness.tokens, "a call was computed twice unasked"
        await asyncio.sleep(120)
        assert all(service.bytes_reserved == 0 for service in services), "a call that is over still holds memory"
        blamed = [code for _, code in swarm.blamed]
        return Story(randomness.tokens, caller.servers_lost, blamed, took_s, trace.lines, jobs, times)


def serves_nothing(model: ModelId, compute_class: str) -> Offer:
    raise CallFault("not-served", "this node serves nothing")


@pytest.fixture(autouse=True)
def two_rows_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_module, "MICRO_BATCH_TOKENS", 2 * TOKENS)


def undisturbed(network: SmallNetwork, devices: dict[str, ArithmeticDevice]) -> None:
    """No fault."""


@cache
def bytes_between(source: str, target: str) -> int:
    """What an undisturbed step sends that way."""
    lines = [line.split(" ") for line in run(step(undisturbed)).trace]
    return sum(int(words[4]) for words in lines if words[1:4] == ["data", target, source])


def at_job(address: str, number: int, act: Callable[[SmallNetwork, str], None]) -> Meddle:
    """Do something to a server when it is handed its job ``number``."""

    def meddle(network: SmallNetwork, devices: dict[str, ArithmeticDevice]) -> None:
        def on_job(device: ArithmeticDevice) -> None:
            if len(device.jobs) == number:
                act(network, address)

        devices[address].on_job = on_job

    return meddle


def test_without_a_loss_every_call_is_asked_and_computed_once() -> None:
    story = run(step(undisturbed))
    micros = ROWS // 2
    for address in (LEFT, RIGHT):
        assert sorted(story.jobs[address]) == ["BackwardJob"] * micros + ["ForwardJob"] * micros
    assert (story.jobs[SPARE], story.asked, story.lost, story.blamed) == ([], 4 * micros, 0, [])


@pytest.mark.parametrize("act", [SmallNetwork.kill, freeze, lambda network, address: network.cut(DRIVER, address)],
                         ids=["killed", "frozen", "cut"])  # fmt: skip
@pytest.mark.parametrize("address", [LEFT, RIGHT])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_server_lost_at_any_job_costs_no_bit(
    act: Callable[[SmallNetwork, str], None], address: str, number: int
) -> None:
    story = run(step(at_job(address, number, act)))
    assert story.lost >= 1
    assert len(story.blamed) >= 1
    assert story.jobs[SPARE], "what was lost was computed elsewhere"
    assert story.took_s < 30


@pytest.mark.parametrize("way", [(DRIVER, LEFT), (LEFT, DRIVER), (DRIVER, RIGHT), (RIGHT, DRIVER)], ids=" to ".join)
def test_a_link_that_breaks_at_any_byte_costs_no_bit(way: tuple[str, str]) -> None:
    most = bytes_between(*way)
    lost = 0
    for position in range(POSITIONS_OF_A_CUT):
        byte = most * position // POSITIONS_OF_A_CUT + position % 7

        def meddle(network: SmallNetwork, devices: dict[str, ArithmeticDevice], byte: int = byte) -> None:
            network.cut_after(*way, byte)

        lost += bool(run(step(meddle)).lost)
    assert lost > POSITIONS_OF_A_CUT * 3 // 4


def test_the_same_losses_tell_the_same_story_twice() -> None:
    one, other = (run(step(at_job(LEFT, 4, SmallNetwork.kill))) for _ in range(2))
    assert one == other


def test_the_forward_of_one_micro_batch_overlaps_the_backward_of_another() -> None:
    story = run(step(undisturbed, piecewise=True))
    begun = [(kind, at, address) for address, times in story.times.items() for kind, at in times]
    beside = [
        (forward, back)
        for forward in begun
        for back in begun
        if (forward[0], back[0]) == ("ForwardJob", "BackwardJob")
        and abs(forward[1] - back[1]) < JOB_S
        and forward[2] != back[2]
    ]
    assert beside
    assert len(begun) == 4 * ROWS
    assert story.took_s < len(begun) * JOB_S


def test_a_server_lost_while_micro_batches_overlap_costs_no_bit() -> None:
    for number in range(1, ROWS + 1):
        story = run(step(at_job(RIGHT, number, SmallNetwork.kill), piecewise=True))
        assert story.lost >= 1 and story.jobs[SPARE]
