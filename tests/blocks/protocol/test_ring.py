"""Driver and hops in one ring, with every lane in order and no order between lanes: no credit lost, no turn twice."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.protocol.commands import (
    CloseChannel,
    HopCommand,
    Output,
    Reply,
    RouteLost,
    SendControl,
    SendData,
    SendNext,
    Submit,
)
from blocks.protocol.device import JobResult, SpanJob
from blocks.protocol.driver import Driver, DriverSettings
from blocks.protocol.hops import Hops, HopSettings
from blocks.protocol.messages import Epoch
from overlay.rpc.types import Message
from routing.types import Hop, Route, Span

from .scenes import CLASS, DRIVER, FIRST, MODEL, SECOND, SESSION, WIDTH, OpenDoor, Still, hidden

# The driver is its own first hop, and one peer has two places.
ROUTES = (
    Route((Hop(DRIVER, (), Span(0, 2)), Hop(FIRST, (), Span(2, 4)), Hop(FIRST, (), Span(4, 6)))),
    Route((Hop(FIRST, (), Span(0, 3)), Hop(SECOND, (), Span(3, 6)))),
)

Lane = tuple[str, Epoch, int]


@dataclass
class Ring:
    """All machines, and the lanes between them: ("down"|"up", epoch, hop) is control, ("data", epoch, to) is data."""

    now: float = 0.0
    lanes: dict[Lane, deque[Message]] = field(default_factory=dict)
    devices: dict[bytes, deque[SpanJob]] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    lost: list[RouteLost] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.driver = Driver(DriverSettings(SESSION, 1, DRIVER, (), MODEL, CLASS, 4096, WIDTH, "float32"))
        self.hops = {peer: Hops(HopSettings(peer, peer[:16]), OpenDoor(), Still()) for peer in (DRIVER, FIRST, SECOND)}
        self.routes: dict[Epoch, Route] = {}

    def open(self, route: Route) -> None:
        before = self.driver.epoch
        epoch = self.driver.open(route, self.now)
        assert epoch > before
        self.routes[epoch] = route
        self.settle()

    def settle(self) -> None:
        """Carry out all commands: messages go to their lanes, jobs to their devices."""
        for command in self.driver.poll_commands():
            if isinstance(command, SendControl):
                self.put(("down", command.epoch, command.hop_index), command.message)
            elif isinstance(command, SendData):
                self.put(("data", command.epoch, 0), command.message)
        for event in self.driver.poll_events():
            if isinstance(event, Output):
                self.outputs.append(event.turn)
            elif isinstance(event, RouteLost):
                self.lost.append(event)
        for peer, hops in self.hops.items():
            for order in hops.poll_commands():
                self.obey(peer, order)

    def obey(self, peer: bytes, order: HopCommand) -> None:
        if isinstance(order, SendNext):
            self.put(("data", order.edge.epoch, order.edge.hop_index + 1), order.message)
        elif isinstance(order, Reply):
            _, epoch, index = cast(Lane, order.channel)
            self.put(("up", epoch, index), order.message)
        elif isinstance(order, Submit) and isinstance(order.job, SpanJob):
            self.devices.setdefault(peer, deque()).append(order.job)
        elif isinstance(order, CloseChannel):
            self.refused.append(order.code)

    def put(self, lane: Lane, message: Message) -> None:
        self.lanes.setdefault(lane, deque()).append(message)

    def busy(self) -> list[Lane | bytes]:
        lanes: list[Lane | bytes] = [lane for lane, waiting in self.lanes.items() if waiting]
        return lanes + [peer for peer, waiting in self.devices.items() if waiting]

    def step(self, what: Lane | bytes) -> None:
        """Deliver the oldest message of a lane, or end the oldest job of a device."""
        if isinstance(what, bytes):
            job = self.devices[what].popleft()
            rows = job.tokens if job.keep < 0 else job.keep
            self.hops[what].job_done(JobResult(job, hidden(rows)), self.now)
        else:
            direction, epoch, index = what
            message = replace(self.lanes[what].popleft())
            route = self.routes[epoch]
            if direction == "up" or index == len(route):
                self.driver.receive(message, message.sender, self.now)
            else:
                self.hops[route.hops[index].peer].receive(message, message.sender, what, self.now)
        self.settle()

    def run_dry(self, data: st.DataObject | None = None) -> None:
        while busy := self.busy():
            self.step(busy[0] if data is None else data.draw(st.sampled_from(busy)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_however_lanes_race_no_credit_is_lost_and_every_turn_is_answered_once(data: st.DataObject) -> None:
    ring = Ring()
    ring.open(ROUTES[0])
    ring.run_dry()
    asked: list[int] = []
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["submit", "submit", "step", "step", "step", "cancel", "open"]))
        if action == "submit":
            tokens = data.draw(st.integers(1, 3))
            turn = ring.driver.submit(hidden(tokens), ring.driver.position, tokens, "last", ring.now)
            asked.append(turn)
            ring.settle()
        elif action == "cancel":
            ring.driver.cancel(ring.now)
            asked = [turn for turn in asked if turn in ring.outputs]
            ring.settle()
        elif action == "open":
            ring.open(ROUTES[data.draw(st.integers(0, 1))])
            asked = [turn for turn in asked if turn in ring.outputs]
        elif busy := ring.busy():
            ring.step(data.draw(st.sampled_from(busy)))
    ring.run_dry(data)
    assert ring.lost == []
    assert ring.refused == []
    assert ring.outputs == asked
    assert ring.driver.room == 4
    ring.driver.close(ring.now)
    ring.settle()
    ring.run_dry(data)
    assert [hops.session_count for hops in ring.hops.values()] == [0, 0, 0]
