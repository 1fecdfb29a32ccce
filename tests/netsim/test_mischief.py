"""What is said is said, whatever is said besides; and each copy is what its cell's name says.

Channels here keep what is sent. What machines make of copies is tests/blocks/protocol/test_cells_*.py and the scenarios.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, cast

import pytest

from netsim import mischief as mischief_module
from netsim.loop import HOST, VirtualLoop, run
from netsim.mischief import CELLS, COPY, DELAY_S_MAX, SWAP_S_MAX, Mischief
from overlay.errors import StreamClosed
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part

S = b"s" * 16
Sent = tuple[object, Message]


class Wire:
    """Channels by name, what was sent on each in order, and the copies that were counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float = 1.0, swaps: float = 0.0) -> None:
        self.sent: list[Sent] = []
        self.hows: list[dict[str, bool]] = []
        self.counted: list[str] = []
        self.ended: set[object] = set()

        def send(channel: object, message: Message, **how: bool) -> None:
            if channel in self.ended:
                raise StreamClosed("The stream has ended.")
            self.sent.append((channel, message))
            self.hows.append(how)

        monkeypatch.setattr(MessageChannel, "send", send)
        loop = cast(VirtualLoop, asyncio.get_running_loop())
        self.mischief = Mischief(loop, random.Random(7), rate, swaps, self.counted.append)

    def say(self, channel: str, message: Message, **how: bool) -> None:
        self.mischief.sent(cast(MessageChannel, channel), message, how)

    def hear(self, channel: str, message: Message) -> None:
        self.mischief.heard(cast(MessageChannel, channel), message)

    def copies(self, name: str) -> list[Sent]:
        return [(channel, message) for channel, message in self.sent if message.header.get(COPY) == name]

    def plain(self) -> list[Message]:
        return [message for _, message in self.sent if COPY not in message.header]


def of_session(kind: str, hop: int = 0, epoch: int = 1, parts: tuple[Part, ...] = (), **fields: Any) -> Message:
    header = {"k": kind, "f": b"f", "t": b"t", "p": [], "s": S, "h": hop, "e": [3, epoch], **fields}
    return Message(kind, header, parts, b"f", b"t", b"encoded", b"signed")


def window(turn: int, kind: str = "window", **told: Any) -> Message:
    fields: dict[str, Any] = {
        "b": 0,
        "n": turn,
        "o": turn - 1,
        "c": 1,
        "w": "last",
        "m": "model",
        "cc": "class",
        "a": None,
    }
    part = Part("hidden", "float32", (1, 1), bytes([turn % 256]) * 4)
    return of_session(kind, parts=(part,), digest=bytes([turn % 256]) * 32, **fields, **told)


def on_wire(work: Callable[[], Any], host: str = "home-1") -> None:
    """Run ``work`` as that host would, and wait until all that was put off has come."""

    async def main() -> None:
        HOST.set(host)
        work()
        await asyncio.sleep(10.0)

    run(main())


def test_cells_have_names_of_their_own_and_a_rate_of_nothing_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    wires: list[Wire] = []
    said = [window(turn) for turn in range(1, 20)]

    def work() -> None:
        wires.append(Wire(monkeypatch, rate=0.0))
        for message in said:
            wires[0].say("data", message)

    on_wire(work)
    assert wires[0].sent == [("data", message) for message in said]


@pytest.mark.parametrize(
    ("host", "message", "how"),
    [
        ("", window(1), {}),
        ("home-1", Message("find_node", {"k": "find_node"}), {}),
        ("home-1", of_session("heartbeat"), {}),
        ("home-1", window(1), {"close": True}),
    ],
)
def test_what_is_nobodys_or_no_message_of_a_session_goes_out_as_it_is(
    host: str, message: Message, how: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    wires: list[Wire] = []

    def work() -> None:
        wires.append(Wire(monkeypatch, swaps=1.0))
        for _ in range(3):
            wires[0].say("channel", message, **how)

    on_wire(work, host)
    assert wires[0].sent == [("channel", message)] * 3
    assert wires[0].hows == [how] * 3


def test_each_copy_of_a_drivers_windows_is_what_its_cell_says(monkeypatch: pytest.MonkeyPatch) -> None:
    wires: list[Wire] = []
    said = [window(turn) for turn in range(1, 101)]

    def work() -> None:
        wires.append(Wire(monkeypatch))
        for message in said:
            wires[0].say("data", message)
        for turn in range(101, 120):
            wires[0].say("data of the next epoch", window(turn, epoch=2))

    on_wire(work)
    wire = wires[0]
    assert wire.plain()[:100] == said, "in order, each once, as it was signed"
    assert sorted(wire.counted) == sorted(
        str(message.header[COPY]) for _, message in wire.sent if COPY in message.header
    )
    by_digest = {message.header["digest"]: message.header for message in said}

    def ways(column: str) -> list[tuple[int, int]]:
        """Of a cell's copies, how far the turn and the epoch are from those of the window of the same digest."""
        found = []
        for _, message in wire.copies(f"hop.window-{column}"):
            header = message.header
            if header["digest"] in by_digest:
                was = by_digest[header["digest"]]
                found.append((header["n"] - was["n"], header["e"][1] - was["e"][1]))
        assert found, column
        return found[:5]

    assert set(ways("duplicate")) == {(0, 0)}
    assert set(ways("early")) == {(0, 1)}
    assert set(ways("late")) == {(0, -1)}
    assert set(ways("early-next")) == {(1, 1)}
    assert set(ways("late-next")) == {(1, -1)}
    assert set(ways("early-place")) == {(mischief_module.FAR, 0)}
    assert set(ways("late-turn")) == {(0, 0)}
    turns: list[int] = []
    for _, message in wire.sent:
        if message.header.get(COPY) == "hop.window-late-turn":
            assert message.header["n"] < max(turns)
        if COPY not in message.header:
            turns.append(message.header["n"])
    ((channel, former),) = wire.copies("hop.window-late-epoch")
    assert (channel, former.header["n"], former.header["e"]) == ("data of the next epoch", 1, [3, 1])


def test_copies_are_to_be_signed_anew_and_name_their_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    wires: list[Wire] = []

    def work() -> None:
        wires.append(Wire(monkeypatch))
        for turn in range(1, 20):
            wires[0].say("results", window(turn, "result"))

    on_wire(work)
    copies = [message for _, message in wires[0].sent if COPY in message.header]
    assert copies
    for copy in copies:
        assert (copy.header_bytes, copy.signature, copy.sender, copy.recipient) == (None, None, b"", b"")
        assert not {"k", "f", "t", "p"} & set(copy.header)


def test_cells_that_came_least_come_next(monkeypatch: pytest.MonkeyPatch) -> None:
    wires: list[Wire] = []
    cells = [cell.name for cell in CELLS if cell.trigger == "result"]

    def work() -> None:
        wires.append(Wire(monkeypatch))
        for turn in range(1, 3 * len(cells) + 2):
            wires[0].say("results", window(turn, "result"))

    on_wire(work)
    times = [wires[0].counted.count(name) for name in cells]
    assert min(times) >= 2
    assert max(times) - min(times) <= 1


def test_a_hop_answers_backwards_on_the_stream_that_it_heard_windows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wires: list[Wire] = []

    def work() -> None:
        wires.append(Wire(monkeypatch))
        for turn in range(1, 30):
            wires[0].hear("inbound", window(turn, hop=2))

    on_wire(work)
    wire = wires[0]
    assert wire.plain() == [], "what is heard isn't said"
    for name, epoch in (("first", 1), ("duplicate", 1), ("early", 2), ("late", 0)):
        channel, copy = wire.copies(f"hop.gap-{name}")[0]
        assert (channel, copy.kind, copy.header["h"], copy.header["e"]) == ("inbound", "gap", 2, [3, epoch])


def test_a_window_may_go_after_the_next_one_and_goes_alone_where_no_next_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[int] = []

    async def main() -> None:
        HOST.set("home-1")
        wire = Wire(monkeypatch, rate=0.0, swaps=1.0)
        for turn in (1, 2, 3, 4):
            wire.say("data", window(turn))
        turns.extend(message.header["n"] for message in wire.plain())
        await asyncio.sleep(SWAP_S_MAX + 0.01)
        turns.extend(message.header["n"] for message in wire.plain()[3:])

    run(main())
    assert turns == [1, 3, 2, 4]


def test_copies_come_soon_and_none_while_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        HOST.set("home-1")
        wire = Wire(monkeypatch)
        for turn in range(1, 50):
            wire.say("results", window(turn, "result"))
        at_once = len(wire.counted)
        await asyncio.sleep(DELAY_S_MAX + 0.01)
        soon = len(wire.counted)
        assert 0 < at_once < soon
        wire.mischief.quiet = True
        for turn in range(50, 99):
            wire.say("results", window(turn, "result"))
        await asyncio.sleep(10.0)
        assert len(wire.counted) == soon

    run(main())


def test_a_copy_for_a_stream_that_has_ended_is_none_and_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        HOST.set("home-1")
        wire = Wire(monkeypatch)
        for turn in range(1, 50):
            wire.say("results", window(turn, "result"))
        before = len(wire.counted)
        wire.ended.add("results")
        await asyncio.sleep(10.0)
        assert len(wire.counted) == before
        with pytest.raises(StreamClosed):
            wire.say("results", window(50, "result"))

    run(main())


def test_streams_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        HOST.set("home-1")
        monkeypatch.setattr(mischief_module, "LANES_MAX", 8)
        wire = Wire(monkeypatch, rate=0.0)
        for number in range(20):
            wire.say(f"data {number}", window(1, hop=number))
        assert [str(lane.channel) for lane in wire.mischief._lanes.values()] == [f"data {at}" for at in range(12, 20)]
        assert len(wire.mischief._firsts) == 8

    run(main())
