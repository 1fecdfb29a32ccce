"""The strict reading of session messages: any `Message` in, a value or `BadMessage` out.

Owns the bounds of every field of `docs/protocol.md` section 3. Peers are hostile: a field of the wrong type, out
of range or missing names itself in the error, and nothing else is ever raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import pairwise
from typing import Any

from blocks.protocol import limits
from blocks.protocol.fields import (
    read_bytes,
    read_integer,
    read_list,
    read_number,
    read_optional_number,
    read_text,
)
from blocks.protocol.messages import (
    RESERVED_KINDS,
    Cancel,
    Close,
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
    SessionMessage,
    Want,
    Window,
    wanted_rows,
)
from blocks.protocol.session_errors import BadMessage
from overlay.rpc.types import Message, Part
from routing.types import MODEL_ID_BYTES, Hop, ModelId, Span

Header = Mapping[str, Any]


def decode(message: Message) -> SessionMessage:
    """Read a session message; raises only `BadMessage`, with the reason, whatever the peer sent."""
    reader = _READERS.get(message.kind)
    if reader is None:
        raise BadMessage(f"{message.kind[:32]!r} is no kind of session message")
    header = message.header
    session = header.get("s")
    if type(session) is not bytes or len(session) != limits.SESSION_ID_BYTES:
        raise BadMessage("a session id is 16 bytes")
    pair = header.get("e")
    if type(pair) not in (list, tuple) or len(pair) != 2:  # type: ignore[arg-type]
        raise BadMessage("an epoch is a pair of integers")
    incarnation, counter = pair  # type: ignore[misc]
    if type(incarnation) is not int or type(counter) is not int:
        raise BadMessage("an epoch is a pair of integers")
    if not (0 <= incarnation <= limits.COUNTER_MAX and 0 <= counter <= limits.COUNTER_MAX):
        raise BadMessage("an epoch is out of range")
    hop_index = read_integer(header, "h", 0, limits.ROUTE_HOPS_MAX - 1)
    return reader(message, session, Epoch(incarnation, counter), hop_index)


def _read_want(header: Header, position: int, tokens: int) -> Want:
    want = header.get("w")
    if want == "last" or want == "none" or want == "all":
        return want  # type: ignore[no-any-return]
    if type(want) is list and len(want) == 2 and type(want[0]) is int and type(want[1]) is int:
        if position <= want[0] < want[1] <= position + tokens:
            return (want[0], want[1])
        raise BadMessage("the rows wanted lie outside the window")
    raise BadMessage("want is none, last, all or a range of positions")


def _one_part(message: Message) -> Part | None:
    if len(message.parts) > 1:
        raise BadMessage("a window has one part at most")
    if not message.parts:
        return None
    part = message.parts[0]
    if part.name != "hidden" or len(part.shape) != 2 or part.size_bytes != len(part.data):
        raise BadMessage("the part of a window is hidden, of shape (tokens, d_model)")
    return part


def _lane_fields(header: Header) -> tuple[int, int, int, int, Want, ModelId, str, str, bytes | None]:
    branch = read_integer(header, "b", 0, limits.BRANCHES_MAX - 1)
    turn = read_integer(header, "n", 1, limits.COUNTER_MAX)
    position = read_integer(header, "o", 0, limits.CONTEXT_TOKENS_MAX)
    tokens = read_integer(header, "c", 1, limits.WINDOW_TOKENS_MAX)
    digest = header.get("digest")
    if digest is not None and (type(digest) is not bytes or len(digest) != limits.DIGEST_BYTES):
        raise BadMessage("a digest is 32 bytes")
    return (
        branch,
        turn,
        position,
        tokens,
        _read_want(header, position, tokens),
        ModelId(read_bytes(header, "m", MODEL_ID_BYTES)),
        read_text(header, "cc", limits.NAME_CHARS_MAX),
        read_text(header, "a", limits.NAME_CHARS_MAX),
        digest,
    )


def _read_window(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Window:
    fields = _lane_fields(message.header)
    hidden = _one_part(message)
    if (message.header.get("x") is True) != (hidden is None):
        raise BadMessage("a window has its hidden part, unless it was cancelled")
    if hidden is not None and hidden.shape[0] != fields[3]:
        raise BadMessage("a window has one row per token")
    return Window(session, epoch, hop_index, *fields, hidden)


def _read_result(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Result:
    fields = _lane_fields(message.header)
    hidden = _one_part(message)
    cancelled = message.header.get("x") is True
    rows = 0 if cancelled else wanted_rows(fields[4], fields[3])
    if (0 if hidden is None else hidden.shape[0]) != rows:
        raise BadMessage("a result has the rows that were wanted")
    return Result(session, epoch, hop_index, *fields, hidden, cancelled)


def _read_open(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Open:
    header = message.header
    entries = read_list(header, "route", limits.ROUTE_HOPS_MAX)
    route = tuple(_read_hop(entry) for entry in entries)
    if hop_index >= len(route):
        raise BadMessage("a route has the hop that it is sent to")
    for before, after in pairwise(route):
        if before.span.end != after.span.start:
            raise BadMessage("a route has no gaps")
    prompts = _read_prompts(message, len(route[hop_index].span))
    return Open(
        session,
        epoch,
        hop_index,
        ModelId(read_bytes(header, "model", MODEL_ID_BYTES)),
        read_text(header, "class", limits.NAME_CHARS_MAX),
        read_text(header, "adapter", limits.NAME_CHARS_MAX),
        route,
        _read_addresses(header.get("driver")),
        read_integer(header, "max_tokens", 1, limits.CONTEXT_TOKENS_MAX),
        read_number(header, "heartbeat_s", limits.HEARTBEAT_S_MIN, limits.HEARTBEAT_S_MAX),
        read_number(header, "lease_s", 0.0, limits.DURATION_S_MAX),
        prompts,
        b"" if prompts is None else prompts.digest or sha256(prompts.data).digest(),
    )


def _read_prompts(message: Message, blocks: int) -> Part | None:
    if not message.parts:
        return None
    part = message.parts[0]
    fits = part.name == "prompts" and len(part.shape) == 3 and part.shape[0] == blocks and all(part.shape)
    if len(message.parts) > 1 or not fits or part.size_bytes != len(part.data):
        raise BadMessage("the part of an open is prompts, of shape (blocks of the hop, length, d_model)")
    if part.size_bytes > limits.OPEN_PROMPTS_BYTES_MAX:
        raise BadMessage(f"the prompts of an open have at most {limits.OPEN_PROMPTS_BYTES_MAX} bytes")
    return part


def _read_addresses(value: object) -> tuple[str, ...]:
    if type(value) is not list or len(value) > limits.HOP_ADDRESSES_MAX:
        raise BadMessage("addresses are a short list")
    for address in value:
        if type(address) is not str or len(address) > limits.ADDRESS_CHARS_MAX:
            raise BadMessage("an address is a short text")
    return tuple(value)


def _read_hop(entry: object) -> Hop:
    if type(entry) is not list or len(entry) != 4:
        raise BadMessage("a hop of a route is [peer, addresses, start, end]")
    peer, addresses, start, end = entry
    if type(peer) is not bytes or not 0 < len(peer) <= limits.PEER_ID_BYTES_MAX:
        raise BadMessage("a hop's peer is a peer id")
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= limits.BLOCKS_MAX:
        raise BadMessage("a hop's span is out of range")
    return Hop(peer, _read_addresses(addresses), Span(start, end))


def _read_ready(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Ready:
    header = message.header
    pairs = read_list(header, "kv_have", limits.BRANCHES_MAX)
    for pair in pairs:
        if type(pair) is not list or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
            raise BadMessage("kv_have is a list of [branch, tokens]")
    return Ready(
        session,
        epoch,
        hop_index,
        read_bytes(header, "boot", limits.BOOT_ID_BYTES),
        tuple((pair[0], pair[1]) for pair in pairs),
        read_integer(header, "journal_from", 0, limits.CONTEXT_TOKENS_MAX),
        read_integer(header, "windows", 1, limits.COUNTER_MAX),
        read_integer(header, "bytes", 1, limits.COUNTER_MAX),
        read_integer(header, "rollback_tokens", 0, limits.COUNTER_MAX),
    )


def _read_gap(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Gap:
    header = message.header
    return Gap(
        session,
        epoch,
        hop_index,
        read_integer(header, "b", 0, limits.BRANCHES_MAX - 1),
        read_integer(header, "n", 1, limits.COUNTER_MAX),
        read_integer(header, "have", 0, limits.CONTEXT_TOKENS_MAX),
    )


def _read_cancel(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Cancel:
    return Cancel(session, epoch, hop_index, read_integer(message.header, "n", 0, limits.COUNTER_MAX))


def _read_heartbeat(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Heartbeat:
    header = message.header
    if "boot" not in header:
        return Heartbeat(session, epoch, hop_index)
    return Heartbeat(
        session,
        epoch,
        hop_index,
        read_bytes(header, "boot", limits.BOOT_ID_BYTES),
        read_integer(header, "steps", 0, limits.COUNTER_MAX),
        read_integer(header, "queue", 0, limits.COUNTER_MAX),
        read_optional_number(header, "oldest_s", 0.0, limits.DURATION_S_MAX),
    )


def _read_report(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Report:
    header = message.header
    return Report(
        session,
        epoch,
        hop_index,
        read_integer(header, "edge", 0, limits.ROUTE_HOPS_MAX),
        read_text(header, "code", limits.NAME_CHARS_MAX),
        read_text(header, "message", limits.TEXT_CHARS_MAX),
    )


def _read_leaving(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Leaving:
    deadline_s = read_number(message.header, "deadline_s", 0.0, limits.DURATION_S_MAX)
    return Leaving(session, epoch, hop_index, deadline_s)


def _read_close(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Close:
    return Close(session, epoch, hop_index)


def _read_error(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> SessionError:
    header = message.header
    turn = None if header.get("n") is None else read_integer(header, "n", 0, limits.COUNTER_MAX)
    return SessionError(
        session,
        epoch,
        hop_index,
        read_text(header, "code", limits.NAME_CHARS_MAX),
        read_text(header, "message", limits.TEXT_CHARS_MAX),
        header.get("retryable") is True,
        read_optional_number(header, "retry_after_s", 0.0, limits.DURATION_S_MAX),
        turn,
    )


def _read_reserved(message: Message, session: bytes, epoch: Epoch, hop_index: int) -> Reserved:
    return Reserved(session, epoch, hop_index, message.kind)


_READERS: dict[str, Callable[[Message, bytes, Epoch, int], SessionMessage]] = {
    "open": _read_open,
    "ready": _read_ready,
    "window": _read_window,
    "result": _read_result,
    "gap": _read_gap,
    "cancel": _read_cancel,
    "heartbeat": _read_heartbeat,
    "report": _read_report,
    "leaving": _read_leaving,
    "close": _read_close,
    "error": _read_error,
    **dict.fromkeys(RESERVED_KINDS, _read_reserved),
}
