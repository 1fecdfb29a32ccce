"""The ledger against a hop whose every word is known: what has a message behind it is let pass, what has none is not.

Channels and devices do nothing here; the ledger looks at their methods as it does in a run. Every complaint is what ``unasked`` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocks.protocol.device import LeaseKey, ReleaseJob, SpanJob
from netsim.devices import SimDevice
from netsim.ledger import PLACES_MAX, Ledger
from netsim.loop import HOST
from netsim.mischief import COPY
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part
from routing.types import Span

S = b"s" * 16
HOP = 1
PART = Part("hidden", "float32", (1,), b"1234")


class Host:
    """One hop of one session, by what it hears, says and computes."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.complaints: list[str] = []
        self.session = S
        self.epoch = [1, 1]

    def hears(self, kind: str, *, hop: int = HOP, empty: bool = False, copy: str = "", **fields: Any) -> None:
        """A message to it; of a gap, from the next hop."""
        MessageChannel._accept(cast(MessageChannel, None), self._message(kind, hop, empty, copy, fields), 0)

    def says(self, kind: str, *, hop: int = HOP, empty: bool = False, copy: str = "", **fields: Any) -> None:
        MessageChannel.send(cast(MessageChannel, None), self._message(kind, hop, empty, copy, fields))

    def computes(self, position: int, tokens: int = 1) -> None:
        job = SpanJob("m", LeaseKey(self.session, HOP), Span(0, 2), position, tokens, PART, 100)
        SimDevice._result(cast(SimDevice, SimpleNamespace()), job)

    def drops_kv(self) -> None:
        SimDevice._result(cast(SimDevice, SimpleNamespace()), ReleaseJob(LeaseKey(self.session, HOP)))

    def window(self, turn: int, copy: str = "", **fields: Any) -> None:
        """Turn n is of position n - 1 and one token."""
        self.hears("window", n=turn, o=turn - 1, c=1, copy=copy, **fields)

    def result(self, turn: int, **fields: Any) -> None:
        self.says("result", n=turn, o=turn - 1, c=1, **fields)

    def _message(self, kind: str, hop: int, empty: bool, copy: str, fields: dict[str, Any]) -> Message:
        header = {"s": self.session, "h": hop, "e": self.epoch, **fields}
        if copy:
            header[COPY] = copy
        return Message(kind, header, () if empty or kind not in ("window", "result") else (PART,))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    for kind, name in ((MessageChannel, "send"), (MessageChannel, "_accept"), (SimDevice, "_result")):
        monkeypatch.setattr(kind, name, lambda *_, **__: None)
    hop = Host()

    def count(name: str, by: int) -> None:
        hop.counted[name] += by

    def complain(host: str, session: str, text: str) -> None:
        assert (host, session) == ("home-1", hop.session.hex())
        hop.complaints.append(text)

    token = HOST.set("home-1")
    with Ledger(count, complain).entered():
        yield hop
    HOST.reset(token)


def test_a_window_heard_once_computed_once_and_answered_once_is_nothing_to_tell(host: Host) -> None:
    for turn in (1, 2, 3):
        host.window(turn)
        host.computes(turn - 1)
        host.result(turn)
    assert (host.complaints, host.counted) == ([], {})


def test_a_result_said_twice_without_a_gap_is_unasked(host: Host) -> None:
    host.window(1)
    host.result(1)
    host.result(1)
    assert host.complaints == ["said turn 1 for the 2. time, and heard it 1 times in that epoch"]


def test_what_is_passed_on_to_the_next_hop_is_held_against_what_was_heard_too(host: Host) -> None:
    host.window(1)
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    assert host.complaints == []
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    assert len(host.complaints) == 1


def test_a_window_heard_twice_may_be_answered_twice_the_second_time_out_of_the_journal(host: Host) -> None:
    host.window(1)
    host.result(1)
    host.window(1, copy="hop.window-duplicate")
    host.result(1)
    assert host.complaints == []
    assert host.counted == {"journal.answers": 1}
    host.result(1)
    assert len(host.complaints) == 1


def test_a_gap_of_the_next_hop_may_be_filled_once_and_is_a_repair(host: Host) -> None:
    host.window(1)
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    host.hears("gap", hop=HOP + 1, b=0, n=1, have=0)
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    assert host.complaints == []
    assert host.counted == {"gaps": 1, "journal.answers": 1, "journal.repairs": 1}
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    assert len(host.complaints) == 1
    assert host.counted["journal.repairs"] == 1


def test_a_gap_that_is_a_copy_is_no_repair(host: Host) -> None:
    host.window(1)
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    host.hears("gap", hop=HOP + 1, copy="hop.gap-first", b=0, n=1, have=0)
    host.says("window", hop=HOP + 1, n=1, o=0, c=1)
    assert host.complaints == []
    assert host.counted == {"journal.answers": 1}


def test_a_result_in_an_epoch_that_it_was_not_heard_in_is_unasked(host: Host) -> None:
    host.window(1)
    host.result(1)
    host.result(1, e=[1, 2])
    assert host.complaints == ["said turn 1 for the 1. time, and heard it 0 times in that epoch"]


def test_a_position_computed_twice_is_unasked_unless_it_was_asked_twice_or_its_memory_was_dropped(host: Host) -> None:
    host.window(1)
    host.computes(0)
    host.drops_kv()
    host.computes(0)
    assert host.complaints == []
    host.computes(0)
    assert host.complaints == ["computed position 0 for the 2. time, and was asked 1 times"]


def test_a_duplicate_that_is_computed_again_is_unasked_and_a_turn_of_the_same_place_is_not(host: Host) -> None:
    host.window(1)
    host.computes(0)
    host.hears("window", n=2, o=0, c=1)  # said anew after a rollback: another turn
    host.computes(0)
    assert host.complaints == []
    host.hears("window", n=2, o=0, c=1)  # the same turn out of the journal of the hop before
    host.window(1, copy="hop.window-duplicate")
    host.computes(0)
    assert host.complaints == ["computed position 0 for the 3. time, and was asked 2 times"]


def test_an_early_copy_may_be_computed_once_its_epoch_is_opened_a_late_one_never(host: Host) -> None:
    host.window(1)
    host.computes(0)
    host.window(2, copy="hop.window-early")
    host.computes(1)
    assert host.complaints == []
    host.window(3, copy="hop.window-late-epoch", e=[1, 0])
    host.computes(2)
    assert host.complaints == ["computed position 2 for the 1. time, and was asked 0 times"]


def test_what_an_epoch_asked_for_does_not_count_in_the_next(host: Host) -> None:
    host.window(1)
    host.epoch = [1, 2]
    host.window(2)
    host.computes(0)
    assert host.complaints == ["computed position 0 for the 1. time, and was asked 0 times"]


@pytest.mark.parametrize(
    ("cancelled", "epoch", "is_unasked"),
    [(None, [1, 1], True), (1, [1, 1], True), (2, [1, 1], False), (2, [1, 0], True)],
)
def test_a_window_is_emptied_only_under_a_cancel_of_its_epoch(
    cancelled: int | None, epoch: list[int], is_unasked: bool, host: Host
) -> None:
    if cancelled is not None:
        host.hears("cancel", n=cancelled, e=epoch)
    host.window(2)
    host.result(2, x=True, empty=True)
    assert host.counted == {"emptied": 1}
    assert host.complaints == (["emptied turn 2, which nobody had cancelled"] if is_unasked else [])


def test_a_window_that_came_empty_is_passed_on_empty(host: Host) -> None:
    host.window(1, empty=True, x=True)
    host.result(1, x=True, empty=True)
    assert (host.complaints, host.counted) == ([], {})


def test_copies_that_a_host_says_itself_and_hops_that_hear_nothing_are_left_alone(host: Host) -> None:
    host.result(1)
    host.window(1)
    for _ in range(3):
        host.result(1, copy="driver.result-duplicate")
    host.result(1)
    host.session = b"t" * 16
    host.computes(0)
    host.result(1)
    host.says("heartbeat")
    assert host.complaints == []


def test_places_are_bounded_and_the_oldest_is_forgotten(host: Host) -> None:
    host.window(1)
    for index in range(PLACES_MAX):
        host.session = index.to_bytes(16, "big")
        host.window(1)
    host.session = S
    host.result(1)
    host.result(1)
    assert host.complaints == [], "what it heard first isn't known any more"


def test_everything_is_as_before_once_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (MessageChannel.send, MessageChannel._accept, SimDevice._result)
    with Ledger(lambda name, by: None, lambda host, session, text: None).entered():
        assert MessageChannel.send is not before[0]
    assert before == (MessageChannel.send, MessageChannel._accept, SimDevice._result)
