"""The judge of answers against a hop whose every word is known: what docs/protocol.md, 4.1, says is let pass, all else is not.

Channels do nothing here but let the hop say what the case has it say while it hears.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from netsim.answers import UNKNOWN_BY_S, Answers
from netsim.copies import COPY, OTHER_DIGEST, OTHER_MODEL, TOO_FAR
from netsim.loop import HOST
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part

S, NEXT, FAR_AWAY = b"s" * 16, b"next", b"another"
PART = Part("hidden", "float32", (1, 1), b"1234")
ROUTE = [[b"first", [], 0, 2], [b"me", [], 2, 4], [NEXT, [], 4, 6]]
CHANNEL = cast(MessageChannel, SimpleNamespace(_receiver=object(), _ended=False))
READY, GAP, REPORT = {"k": "ready"}, {"k": "gap", "n": 9}, {"k": "report", "edge": 2}


def error(code: str, **fields: Any) -> dict[str, Any]:
    return {"k": "error", "code": code, **fields}


class Hop:
    """Hop 1 of one session: open in epoch (1, 5), with turn 3 heard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.complaints: list[str] = []
        self.counted: Counter[str] = Counter()
        self._says: tuple[dict[str, Any], ...] = ()
        monkeypatch.setattr(MessageChannel, "_accept", lambda channel, message, _: self._answer(message))
        monkeypatch.setattr(MessageChannel, "send", lambda *_, **__: None)
        self.answers = Answers(lambda: self.now, self._count, lambda host, session, text: self.complaints.append(text))

    def begin(self) -> None:
        self.hears("open", READY, route=ROUTE, max_tokens=50)
        self.hears("window", n=3, o=4, c=1)

    def hears(
        self,
        kind: str,
        *says: dict[str, Any],
        e: tuple[int, int] = (1, 5),
        h: int = 1,
        sender: bytes = b"",
        **fields: Any,
    ) -> None:
        """A message, and what the hop says at once."""
        self._says = says
        parts = (PART,) if kind == "window" else ()
        message = Message(kind, {"s": S, "h": h, "e": list(e), **fields}, parts, sender)
        MessageChannel._accept(CHANNEL, message, 0)

    def says(self, said: dict[str, Any], e: Any = (1, 5)) -> None:
        header = {"s": S, "h": 1, "e": list(e), **said}
        MessageChannel.send(CHANNEL, Message(header.pop("k"), header))

    def _answer(self, message: Message) -> None:
        for said in self._says:
            self.says(said, message.header["e"])

    def _count(self, name: str, by: int) -> None:
        self.counted[name] += by


@pytest.fixture
def hop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hop]:
    hop = Hop(monkeypatch)
    token = HOST.set("server-1")
    with hop.answers.entered():
        hop.begin()
        yield hop
    HOST.reset(token)


OPEN = {"kind": "open", "route": ROUTE, "max_tokens": 50}
OTHER = {**OPEN, "route": ROUTE[:2]}
WINDOW = {"kind": "window", "n": 3, "o": 4, "c": 1}
CASES: list[tuple[dict[str, Any], tuple[dict[str, Any], ...]]] = [
    (OPEN, (READY,)),
    (OTHER, (error("conflict"),)),
    ({**OPEN, "e": (1, 4)}, (error("stale-epoch"),)),
    ({**OPEN, "e": (0, 9)}, (error("fenced"),)),
    ({"kind": "fork"}, (error("unsupported"),)),
    ({"kind": "fork", "e": (1, 9)}, (error("unsupported"),)),
    ({"kind": "cancel", "n": 3}, ()),
    ({"kind": "heartbeat", "e": (1, 6)}, ()),
    ({"kind": "close", "e": (1, 4)}, ()),
    ({**WINDOW, COPY: "hop.window-duplicate"}, ()),
    ({**WINDOW, COPY: OTHER_DIGEST}, (error("conflict"),)),
    ({**WINDOW, "n": 9, "o": 8, COPY: TOO_FAR}, (GAP,)),
    ({**WINDOW, "n": 4, "o": 5, COPY: OTHER_MODEL}, ({"k": "report", "edge": 0},)),
    ({**WINDOW, "e": (1, 4)}, ()),
    ({"kind": "error", "h": 2, "code": "conflict", "sender": NEXT}, (REPORT,)),
    ({"kind": "error", "h": 2, "code": "conflict", "sender": FAR_AWAY}, ()),
    ({"kind": "error", "h": 2, "code": "conflict", "sender": NEXT, "e": (1, 6)}, ()),
]


@pytest.mark.parametrize(("message", "answer"), CASES)
def test_what_the_table_says_is_let_pass_and_nothing_or_another_word_is_not(
    hop: Hop, message: dict[str, Any], answer: tuple[dict[str, Any], ...]
) -> None:
    judged = hop.counted["answers"]
    hop.hears(message["kind"], *answer, **_fields(message))
    assert hop.complaints == []
    assert hop.counted["answers"] == judged + 1


@pytest.mark.parametrize(("message", "answer"), CASES)
def test_a_wrong_or_missing_answer_is_seen(
    hop: Hop, message: dict[str, Any], answer: tuple[dict[str, Any], ...]
) -> None:
    wrong = () if answer else (error("conflict"), {"k": "report", "edge": 2})
    hop.hears(message["kind"], *wrong, **_fields(message))
    assert len(hop.complaints) == 1


def test_after_a_close_what_is_late_is_stale_and_a_higher_epoch_is_free(hop: Hop) -> None:
    hop.hears("close", e=(1, 7))
    hop.hears("open", error("stale-epoch"), **_fields(OPEN))
    hop.hears("open", error("stale-epoch"), **_fields({**OPEN, "e": (1, 7)}))
    hop.hears("window", **_fields(WINDOW))
    hop.hears("open", READY, **_fields({**OTHER, "e": (1, 8)}))
    hop.hears("open", READY, **_fields({**OTHER, "e": (1, 8)}))
    assert hop.complaints == []


def test_an_edge_is_reported_once(hop: Hop) -> None:
    for said in ((REPORT,), ()):
        hop.hears("error", *said, h=2, code="conflict", sender=NEXT)
    assert hop.complaints == []
    hop.hears("error", REPORT, h=2, code="conflict", sender=NEXT)
    assert len(hop.complaints) == 1


def test_a_window_of_an_unknown_epoch_is_answered_in_time_unless_its_open_comes(hop: Hop) -> None:
    hop.hears("window", e=(1, 6), n=4, o=5, c=1)
    hop.now += UNKNOWN_BY_S
    hop.hears("window", e=(1, 7), n=4, o=5, c=1)
    hop.says(error("unknown-epoch", n=4), (1, 7))
    hop.answers.finish()
    assert [text for text in hop.complaints if "never said" in text] == hop.complaints != []
    hop.complaints.clear()
    hop.hears("open", READY, **_fields({**OPEN, "e": (1, 6)}))
    hop.answers.finish()
    assert hop.complaints == []
    hop.says(error("unknown-epoch", n=5), (1, 7))
    assert len(hop.complaints) == 1


def _fields(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "kind"}
