"""A hop or a driver on a bare stage: messages in, commands out, time by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from blocks.protocol.admission import Grant, Wish
from blocks.protocol.commands import HopCommand, OpenNext, Reply, RouteReady, SendNext, Submit
from blocks.protocol.decoding import decode
from blocks.protocol.device import JobResult, LeaseKey, SpanJob
from blocks.protocol.driver import Driver, DriverSettings
from blocks.protocol.hops import Hops, HopSettings
from blocks.protocol.messages import Envelope, Epoch, Open, Ready, SessionMessage, Window
from overlay.errors import PeerdError
from overlay.rpc.types import Message, Part
from routing.types import ComputeClass, Hop, ModelId, Route, Span

SESSION = b"s" * 16
MODEL = ModelId(b"m" * 32)
CLASS = ComputeClass("none", "float32")
DRIVER, FIRST, SECOND, THIRD, STRANGER = (bytes([letter]) * 38 for letter in b"DFSTX")
WIDTH = 4
BOOT = b"b" * 16
E1 = Epoch(1, 1)


def hidden(tokens: int, fill: int = 1) -> Part:
    return Part("hidden", "float32", (tokens, WIDTH), bytes([fill]) * (tokens * WIDTH * 4))


ROUTE = Route(
    (
        Hop(FIRST, ("/ip4/127.0.0.1/tcp/1",), Span(0, 2)),
        Hop(SECOND, ("/ip4/127.0.0.1/tcp/2",), Span(2, 4)),
        Hop(THIRD, ("/ip4/127.0.0.1/tcp/3",), Span(4, 6)),
    )
)


def prompts(length: int = 3, fill: int = 1, blocks: int = 2, width: int = WIDTH, dtype: str = "float32") -> Part:
    return Part("prompts", dtype, (blocks, length, width), bytes([fill]) * (blocks * length * width * 4))


class OpenDoor:
    """Admission that grants until told otherwise, and remembers what is held."""

    def __init__(self) -> None:
        self.grant: Grant | PeerdError = Grant("demo", 4, 4096, 64, WIDTH, "float32")
        self.held: list[LeaseKey] = []

    def admit(self, lease: LeaseKey, wish: Wish) -> Grant | PeerdError:
        if isinstance(self.grant, Grant):
            assert lease not in self.held
            self.held.append(lease)
        return self.grant

    def release(self, lease: LeaseKey) -> None:
        self.held.remove(lease)


@dataclass
class Still:
    """A gauge that moves when told."""

    step_count: int = 0
    queue_depth: int = 0


@dataclass
class HopScene:
    """The hop ``index`` of ROUTE, served by a `Hops` of its peer."""

    index: int = 1
    route: tuple[Hop, ...] = ROUTE.hops
    now: float = 100.0
    door: OpenDoor = field(default_factory=OpenDoor)
    gauge: Still = field(default_factory=Still)
    commands: list[HopCommand] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.peer = self.route[self.index].peer
        self.hops = Hops(HopSettings(self.peer, BOOT), self.door, self.gauge)
        self.predecessor = DRIVER if self.index == 0 else self.route[self.index - 1].peer
        self.successor = DRIVER if self.index == len(self.route) - 1 else self.route[self.index + 1].peer

    def order(self, epoch: Epoch = E1, **changes: object) -> Open:
        order = Open(
            SESSION, epoch, self.index, MODEL, str(CLASS), "", self.route, ("/ip4/127.0.0.1/tcp/9",), 64, 1.0, 30.0
        )  # fmt: skip
        return replace(order, **changes)  # type: ignore[arg-type]

    def window(self, turn: int = 1, position: int = 0, tokens: int = 1, fill: int = 1, **changes: object) -> Window:
        window = Window(
            SESSION, Epoch(1, 1), self.index, 0, turn, position, tokens, "last", MODEL, str(CLASS), "", None,
            hidden(tokens, fill),
        )  # fmt: skip
        return replace(window, **changes)  # type: ignore[arg-type]

    def say(self, message: Envelope, sender: bytes = DRIVER, channel: object = "control") -> list[HopCommand]:
        """Deliver ``message`` as if it had come over the wire; what the machine asks for comes back."""
        wire = replace(message.to_message(sender, self.peer), header_bytes=b"")
        self.hops.receive(wire, sender, channel, self.now)
        return self.poll()

    def feed(self, window: Window) -> list[HopCommand]:
        return self.say(window, self.predecessor, "data")

    def opened(self) -> HopScene:
        self.say(self.order())
        return self

    def poll(self) -> list[HopCommand]:
        commands = self.hops.poll_commands()
        self.commands += commands
        return commands

    def finish(self, job: SpanJob, fill: int = 7) -> list[HopCommand]:
        """The device ends ``job``."""
        rows = job.tokens if job.keep < 0 else job.keep
        self.hops.job_done(JobResult(job, hidden(rows, fill)), self.now)
        return self.poll()

    def compute(self, window: Window, fill: int = 7) -> list[HopCommand]:
        """Feed a window and let the device end it; what is asked for after that comes back."""
        (job,) = jobs(self.feed(window))
        return self.finish(job, fill)

    def wait(self, seconds: float) -> list[HopCommand]:
        """Let time pass, tick by tick."""
        end = self.now + seconds
        while (due := self.hops.next_timeout()) is not None and due <= end:
            self.now = due
            self.hops.on_timeout(self.now)
        self.now = end
        return self.poll()


def jobs(commands: list[HopCommand]) -> list[SpanJob]:
    return [c.job for c in commands if isinstance(c, Submit) and isinstance(c.job, SpanJob)]


def said(commands: list[HopCommand], channel: object = "control") -> list[SessionMessage]:
    """What went back on a channel."""
    return [decode(c.message) for c in commands if isinstance(c, Reply) and c.channel == channel]


def passed_on(commands: list[HopCommand]) -> list[SessionMessage]:
    return [decode(c.message) for c in commands if isinstance(c, SendNext)]


def edges(commands: list[HopCommand]) -> list[OpenNext]:
    return [c for c in commands if isinstance(c, OpenNext)]


@dataclass
class DriverScene:
    """A driver over ROUTE; the test plays the hops."""

    route: Route = ROUTE
    now: float = 100.0
    windows: int = 2
    window_bytes: int = 4096
    prompts: Part | None = None

    def __post_init__(self) -> None:
        settings = DriverSettings(SESSION, 1, DRIVER, (), MODEL, CLASS, 64, WIDTH, "float32", prompts=self.prompts)
        self.driver = Driver(settings)
        self.epoch = self.driver.open(self.route, self.now)

    def ready(self, index: int, epoch: Epoch | None = None, boot: bytes = BOOT) -> Ready:
        return Ready(SESSION, epoch or self.epoch, index, boot, (), 0, self.windows, self.window_bytes, 64)

    def say(self, message: Envelope, sender: bytes | None = None) -> None:
        """Deliver ``message`` from the hop that it names."""
        peer = sender or self.route.hops[message.hop_index].peer
        self.driver.receive(message.to_message(peer, DRIVER), peer, self.now)

    def flowing(self) -> DriverScene:
        for index in range(len(self.route)):
            self.say(self.ready(index))
        assert any(isinstance(event, RouteReady) for event in self.driver.poll_events())
        self.driver.poll_commands()
        return self

    def submit(self, position: int = 0, tokens: int = 1, want: object = "last") -> int:
        return self.driver.submit(hidden(tokens), position, tokens, want, self.now)  # type: ignore[arg-type]

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.driver.next_timeout()) is not None and due <= end:
            self.now = due
            self.driver.on_timeout(self.now)
        self.now = end


def wire(message: Message) -> SessionMessage:
    return decode(message)
