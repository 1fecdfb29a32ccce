"""Hypothesis feeds both machines every message in every state: nothing raises, nothing is done twice, bounds hold."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blocks.protocol import limits
from blocks.protocol.commands import OpenNext, Output, RouteLost, RouteReady, SendData, Submit
from blocks.protocol.device import JobResult, LeaseKey, SpanJob
from blocks.protocol.messages import (
    RESERVED_KINDS,
    Cancel,
    Close,
    Envelope,
    Epoch,
    Gap,
    Heartbeat,
    Leaving,
    Ready,
    Report,
    Reserved,
    Result,
    SessionError,
)
from overlay.errors import ConnectionLost
from overlay.rpc.types import Message, Part

from .scenes import (
    BOOT,
    CLASS,
    DRIVER,
    FIRST,
    MODEL,
    ROUTE,
    SECOND,
    SESSION,
    STRANGER,
    THIRD,
    WIDTH,
    DriverScene,
    HopScene,
    hidden,
    jobs,
)

EPOCHS = st.builds(Epoch, st.integers(1, 2), st.integers(0, 3))
PEERS = st.sampled_from([DRIVER, FIRST, SECOND, THIRD, STRANGER])
CHANNELS = st.sampled_from(["a", "b", "c"])
TURNS = st.integers(1, 9)
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.binary(max_size=40),
    st.lists(st.integers(-2, 9), max_size=3), st.just(float("nan")),
)  # fmt: skip
WINDOW_FIELDS = "s e h b n o c w m cc a digest x route model driver".split()  # noqa: SIM905
READY_FIELDS = "s e h boot steps queue oldest_s windows bytes kv_have journal_from".split()  # noqa: SIM905
GENTLY = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def marked(turn: int, epoch: Epoch, tokens: int) -> Part:
    """Rows that say which window they are of."""
    return Part("hidden", "float32", (tokens, WIDTH), struct.pack("<QQ", turn, epoch.counter) * tokens)


def spoiled(message: Message, field: str, junk: Any) -> Message:
    """The message with one field replaced by something that no honest peer writes."""
    return replace(message, header={**message.header, field: junk}, header_bytes=b"")


class HopStates(RuleBasedStateMachine):
    """Hop 1 of a route, among liars."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = HopScene()
        self.at_device: list[SpanJob] = []
        self.computed: list[tuple[int, bytes]] = []
        self.opened = 0

    def hear(self, message: Envelope, sender: bytes, channel: str) -> None:
        self.after(self.scene.say(message, sender, channel))

    def after(self, commands: list[Any]) -> None:
        self.opened += sum(1 for command in commands if isinstance(command, OpenNext))
        for command in commands:
            if isinstance(command, Submit) and isinstance(command.job, SpanJob):
                self.at_device.append(command.job)
        self.computed += [(self.opened, bytes(job.hidden.data[:16])) for job in jobs(commands)]

    @rule(epoch=EPOCHS, sender=PEERS, channel=CHANNELS)
    def open(self, epoch: Epoch, sender: bytes, channel: str) -> None:
        self.hear(self.scene.order(epoch), sender, channel)

    @rule(epoch=EPOCHS, turn=TURNS, position=st.integers(0, 9), tokens=st.integers(1, 3), sender=PEERS)
    def window(self, epoch: Epoch, turn: int, position: int, tokens: int, sender: bytes) -> None:
        part = marked(turn, epoch, tokens)
        window = self.scene.window(turn, position, tokens, epoch=epoch, hidden=part)
        self.hear(window, sender, "data")

    @rule(turn=TURNS, tokens=st.integers(1, 3))
    def next_window(self, turn: int, tokens: int) -> None:
        """What an honest predecessor sends."""
        session = next(iter(self.scene.hops._sessions.values()), None)
        if session is not None:
            turn = session._turn + turn
            part = marked(turn, session.epoch, tokens)
            window = self.scene.window(turn, session._end, tokens, epoch=session.epoch, hidden=part)
            self.hear(window, FIRST, "data")

    @rule(epoch=EPOCHS, sender=PEERS, channel=CHANNELS, turn=TURNS, which=st.integers(0, 9))
    def say(self, epoch: Epoch, sender: bytes, channel: str, turn: int, which: int) -> None:
        message: Envelope = [
            Cancel(SESSION, epoch, 1, turn),
            Close(SESSION, epoch, 1),
            Heartbeat(SESSION, epoch, 1),
            Gap(SESSION, epoch, 2, 0, turn, turn - 1),
            SessionError(SESSION, epoch, 2, "unknown-epoch", "no", True, None, turn),
            Reserved(SESSION, epoch, 1, RESERVED_KINDS[turn % 4]),
            Ready(SESSION, epoch, 1, BOOT, (), 0, 1, 1, 1),
            Report(SESSION, epoch, 1, 2, "x", "y"),
            Leaving(SESSION, epoch, 1, 3.0),
            self.scene.window(turn, 0, 1, epoch=epoch, hidden=None),
        ][which]
        self.hear(message, sender, channel)

    @rule(
        field=st.sampled_from(
            ["s", "e", "h", "b", "n", "o", "c", "w", "m", "cc", "a", "digest", "x", "route", "model", "driver"]
        ),
        junk=JUNK,
    )
    def spoil(self, field: str, junk: Any) -> None:
        for message in (self.scene.window(), self.scene.order(Epoch(2, 3))):
            spoilt = spoiled(message.to_message(FIRST, SECOND), field, junk)
            self.scene.hops.receive(spoilt, FIRST, "data", self.scene.now)
            self.after(self.scene.poll())

    @rule(fails=st.booleans())
    def device_finishes(self, fails: bool) -> None:
        if self.at_device:
            job = self.at_device.pop(0)
            error = ConnectionLost("the device is gone") if fails else None
            rows = job.tokens if job.keep < 0 else job.keep
            self.scene.hops.job_done(JobResult(job, None if fails else hidden(rows), error=error), self.scene.now)
            self.after(self.scene.poll())

    @rule(channel=CHANNELS)
    def channel_lost(self, channel: str) -> None:
        self.scene.hops.channel_lost(channel, self.scene.now)
        self.after(self.scene.poll())

    @rule()
    def edge_lost(self) -> None:
        opened = [command for command in self.scene.commands if isinstance(command, OpenNext)]
        if opened:
            self.scene.hops.next_lost(opened[-1].edge, ConnectionLost("cut"), self.scene.now)
            self.after(self.scene.poll())

    @rule()
    def memory_is_taken_back(self) -> None:
        self.opened += 1
        self.scene.hops.lease_dropped(LeaseKey(SESSION, 1))
        self.after(self.scene.poll())

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 31.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.after(self.scene.wait(seconds))

    @invariant()
    def no_window_is_computed_twice_for_one_turn(self) -> None:
        assert len(self.computed) == len(set(self.computed))

    @invariant()
    def what_is_granted_is_what_is_served(self) -> None:
        assert len(self.scene.door.held) == self.scene.hops.session_count <= 1

    @invariant()
    def bounds_hold(self) -> None:
        statistics = self.scene.hops.statistics()
        assert statistics.journal_bytes <= limits.JOURNAL_BYTES_MAX
        assert statistics.windows_early <= limits.HELD_WINDOWS_MAX
        assert statistics.windows_held <= 4 + len(self.at_device)


class DriverStates(RuleBasedStateMachine):
    """A driver whose hops may say anything."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = DriverScene()
        self.outputs: list[int] = []
        self.lost: list[Epoch] = []
        self.sent: list[int] = []

    def after(self) -> None:
        for event in self.scene.driver.poll_events():
            if isinstance(event, Output):
                self.outputs.append(event.turn)
            elif isinstance(event, RouteLost):
                self.lost.append(event.epoch)
            elif isinstance(event, RouteReady):
                assert event.window_tokens > 0
        for command in self.scene.driver.poll_commands():
            if isinstance(command, SendData):
                self.sent.append(command.message.header["n"])

    def hear(self, message: Envelope, sender: bytes | None) -> None:
        self.scene.say(message, sender)
        self.after()

    @rule(index=st.integers(0, 2), boot=st.sampled_from([BOOT, BOOT, b"B" * 16]), windows=st.integers(1, 4))
    def ready(self, index: int, boot: bytes, windows: int) -> None:
        self.hear(replace(self.scene.ready(index, boot=boot), windows=windows), None)

    @rule()
    def open(self) -> None:
        self.scene.epoch = self.scene.driver.open(ROUTE, self.scene.now)
        self.after()

    @rule()
    def all_ready(self) -> None:
        self.scene.epoch = self.scene.driver.open(ROUTE, self.scene.now)
        for index in range(3):
            self.scene.say(self.scene.ready(index))
        self.after()

    @rule(tokens=st.integers(1, 3))
    def submit(self, tokens: int) -> None:
        if self.scene.driver.position + tokens <= 64:
            self.scene.submit(self.scene.driver.position, tokens)
            self.after()

    @rule(data=st.data(), tokens=st.integers(1, 3))
    def result(self, data: st.DataObject, tokens: int) -> None:
        turn = data.draw(st.sampled_from(self.sent or [1]))
        under_way = self.scene.driver._ring.under_way.get(turn)
        position, count = (under_way.position, under_way.tokens) if under_way else (0, tokens)
        self.hear(
            Result(SESSION, self.scene.epoch, 2, 0, turn, position, count, "last", MODEL, str(CLASS), "", None, hidden(1)),
            None,
        )  # fmt: skip

    @rule(epoch=EPOCHS, sender=PEERS, index=st.integers(0, 2), turn=TURNS, which=st.integers(0, 8))
    def say(self, epoch: Epoch, sender: bytes, index: int, turn: int, which: int) -> None:
        message: Envelope = [
            Gap(SESSION, epoch, index, 0, turn, 0),
            Heartbeat(SESSION, epoch, index, BOOT, turn, 0, float(turn)),
            Report(SESSION, epoch, index, turn, "x", "y"),
            Leaving(SESSION, epoch, index, 1.0),
            SessionError(SESSION, epoch, index, ["busy", "unsupported", "odd"][turn % 3], "z", True),
            Close(SESSION, epoch, index),
            Cancel(SESSION, epoch, index, turn),
            Ready(SESSION, epoch, index, BOOT, (), 0, 1, 1, 1),
            Reserved(SESSION, epoch, index, "fork"),
        ][which]
        self.hear(message, sender)

    @rule(
        field=st.sampled_from(
            [
                "s",
                "e",
                "h",
                "b",
                "n",
                "o",
                "c",
                "w",
                "m",
                "cc",
                "a",
                "boot",
                "steps",
                "windows",
                "bytes",
                "kv_have",
                "code",
            ]
        ),
        junk=JUNK,
    )
    def spoil(self, field: str, junk: Any) -> None:
        for message in (self.scene.ready(0), Heartbeat(SESSION, self.scene.epoch, 0, BOOT, 1, 1, 1.0)):
            self.scene.driver.receive(spoiled(message.to_message(FIRST, DRIVER), field, junk), FIRST, self.scene.now)
            self.after()

    @rule()
    def cancel(self) -> None:
        self.scene.driver.cancel(self.scene.now)
        self.after()

    @rule(index=st.integers(0, 2))
    def stream_lost(self, index: int) -> None:
        self.scene.driver.hop_lost(self.scene.epoch, index, ConnectionLost("cut"), self.scene.now)
        self.after()

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.scene.wait(seconds)
        self.after()

    @invariant()
    def a_turn_is_sent_once_and_answered_once(self) -> None:
        assert len(self.sent) == len(set(self.sent))
        assert len(self.outputs) == len(set(self.outputs))
        assert set(self.outputs) <= set(self.sent)

    @invariant()
    def a_route_is_lost_once(self) -> None:
        assert len(self.lost) == len(set(self.lost))

    @invariant()
    def credits_are_neither_lost_nor_made(self) -> None:
        left = self.scene.driver._ring.credits
        under_way = self.scene.driver._ring.under_way.values()
        assert 0 <= left.windows_free <= left.windows_granted
        assert left.windows_free + len(under_way) == left.windows_granted
        assert left.bytes_free + sum(turn.size_bytes for turn in under_way) == left.bytes_granted


TestHopStates = HopStates.TestCase
TestHopStates.settings = GENTLY
TestDriverStates = DriverStates.TestCase
TestDriverStates.settings = GENTLY
