"""Every message survives its own encoding, and the real frames; broken ones name the field."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest

from blocks.protocol import limits
from blocks.protocol.decoding import decode
from blocks.protocol.messages import (
    RESERVED_KINDS,
    Cancel,
    Close,
    Envelope,
    Epoch,
    Gap,
    Heartbeat,
    Leaving,
    Open,
    Ready,
    Report,
    Reserved,
    Result,
    SessionError,
    Window,
    wanted_rows,
)
from blocks.protocol.session_errors import BadMessage
from overlay.rpc.codec import Codec
from overlay.rpc.frame import FrameDecoder, encode_frame, encode_header
from overlay.rpc.types import Message, Part

from .scenes import BOOT, CLASS, DRIVER, FIRST, MODEL, ROUTE, SESSION, hidden

E = Epoch(3, 2**62)
MESSAGES: list[Envelope] = [
    Open(SESSION, E, 1, MODEL, str(CLASS), "a", ROUTE.hops, ("/ip4/1.2.3.4/tcp/5",), 64, 1.0, 30.0),
    Ready(SESSION, E, 2, BOOT, ((0, 5),), 3, 4, 4096, 0),
    Window(SESSION, E, 0, 0, 1, 2, 3, (3, 5), MODEL, str(CLASS), "", b"d" * 32, hidden(3)),
    Window(SESSION, E, 0, 0, 1, 2, 3, "all", MODEL, str(CLASS), "", None, None),
    Result(SESSION, E, 2, 0, 1, 2, 3, "last", MODEL, str(CLASS), "", b"d" * 32, hidden(1)),
    Result(SESSION, E, 2, 0, 1, 2, 3, "none", MODEL, str(CLASS), "", None, None),
    Result(SESSION, E, 2, 0, 1, 2, 3, "all", MODEL, str(CLASS), "", None, None, True),
    Gap(SESSION, E, 1, 0, 9, 4),
    Cancel(SESSION, E, 1, 7),
    Heartbeat(SESSION, E, 1),
    Heartbeat(SESSION, E, 1, BOOT, 4, 5, None),
    Heartbeat(SESSION, E, 1, BOOT, 4, 5, 1.5),
    Report(SESSION, E, 1, 2, "edge-lost", "gone"),
    Leaving(SESSION, E, 1, 30.0),
    Close(SESSION, E, 1),
    SessionError(SESSION, E, 1, "busy", "full", True, 2.5, 3),
    *(Reserved(SESSION, E, 0, kind) for kind in RESERVED_KINDS),
]


def raw(part: Part) -> Codec:
    return Codec.RAW


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_it_comes_back_from_its_own_encoding(message: Envelope) -> None:
    assert decode(message.to_message(FIRST, DRIVER)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_it_comes_back_from_the_wire(message: Envelope) -> None:
    sent = message.to_message(FIRST, DRIVER)
    header = encode_header(sent, FIRST, DRIVER)
    data = b"".join(bytes(piece) for piece in encode_frame(header, sent.parts, 0, b"s" * 64, end=False, choose=raw))
    (frame,) = FrameDecoder().feed(memoryview(data))
    assert decode(frame.message).to_message(FIRST, DRIVER) == sent


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (0, "route", []),
        (0, "route", [[FIRST, [], 0, 2], [FIRST, [], 3, 4]]),
        (0, "route", [[FIRST, [], 0, 1]] * 65),
        (0, "driver", ["x" * 257]),
        (0, "heartbeat_s", float("nan")),
        (0, "max_tokens", True),
        (1, "kv_have", [[0, -1]]),
        (1, "windows", 0),
        (2, "w", [0, 9]),
        (2, "w", "most"),
        (2, "c", 4),
        (2, "x", True),
        (2, "digest", b"short"),
        (3, "x", None),
        (4, "w", "all"),
        (7, "e", [1]),
        (7, "e", [1, -1]),
        (7, "s", b"short"),
        (7, "h", 64),
        (8, "n", 2**63),
        (11, "oldest_s", -1),
        (12, "code", "x" * 129),
    ],
)
def test_a_field_out_of_bounds_is_a_bad_message(message: int, field: str, value: object) -> None:
    good = MESSAGES[message].to_message(FIRST, DRIVER)
    with pytest.raises(BadMessage):
        decode(Message(good.kind, {**good.header, field: value}, good.parts))


PROMPTS = Part("prompts", "float32", (2, 1, 4), bytes(32))
OPEN = MESSAGES[0]
assert isinstance(OPEN, Open)


def test_an_open_carries_prompts_and_knows_them_by_their_digest() -> None:
    order = replace(OPEN, prompts=PROMPTS)
    found = decode(order.to_message(FIRST, DRIVER))
    assert isinstance(found, Open)
    assert found.prompts == PROMPTS
    assert found == replace(order, prompts_digest=sha256(bytes(32)).digest()) != OPEN


@pytest.mark.parametrize(
    "parts",
    [
        (PROMPTS, PROMPTS),
        (replace(PROMPTS, name="hidden"),),
        (replace(PROMPTS, shape=(1, 2, 4)),),
        (replace(PROMPTS, shape=(1, 8)),),
        (replace(PROMPTS, shape=(2, 0, 4), data=b""),),
        (replace(PROMPTS, data=bytes(31)),),
    ],
)
def test_prompts_that_are_not_the_hop_s_blocks_are_a_bad_message(parts: tuple[Part, ...]) -> None:
    with pytest.raises(BadMessage):
        decode(replace(OPEN.to_message(FIRST, DRIVER), parts=parts))


def test_prompts_over_their_limit_are_a_bad_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OPEN_PROMPTS_BYTES_MAX", 31)
    with pytest.raises(BadMessage, match="at most 31"):
        decode(replace(OPEN, prompts=PROMPTS).to_message(FIRST, DRIVER))


def test_an_unknown_kind_is_a_bad_message() -> None:
    with pytest.raises(BadMessage):
        decode(Message("hello", {}))


def test_the_rows_wanted_are_counted() -> None:
    assert [wanted_rows(want, 5) for want in ("none", "last", "all", (2, 4))] == [0, 1, 5, 2]
