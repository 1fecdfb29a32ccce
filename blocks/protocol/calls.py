"""What a tensor call may say: messages of `/peerd/tensors/1` to values and back, and their digest. Pure.

docs/training.md, section 2. Everything remote is read strictly: right types, shapes that agree with each other, sizes within
bounds; what depends on the model (its width, its context) is checked against an `Offer`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import msgpack

from blocks.protocol import limits
from blocks.protocol.call_errors import CallFault
from blocks.protocol.device import Batch
from blocks.protocol.fields import read_bytes, read_integer, read_list, read_text
from blocks.protocol.session_errors import BadMessage
from overlay.rpc.types import DTYPE_BYTES, Message, Part, digest_of
from routing.types import ModelId, Span

FORWARD, BACKWARD = "forward", "backward"
OUTPUT, GRADIENTS, PROGRESS, ERROR = "output", "gradients", "progress", "error"
CALL_ID_BYTES = 16
CALL_TOKENS_MAX = 16384
CALL_BYTES_MAX = 128 << 20
CALL_OVERHEAD_BYTES = 4096
MODEL_ID_BYTES = 32
_MASK_VALUES = b"\x00\x01"
_PARTS = ("hidden", "mask", "positions", "prompts", "grad")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server computes of one model in one class."""

    key: str  # the device's name for it
    span: Span
    width: int
    dtype: str
    max_positions: int


@dataclass(frozen=True, slots=True)
class CallRequest:
    """One call. ``grad`` is there when ``kind`` is backward, and only then."""

    kind: str
    call: bytes
    model: ModelId
    compute_class: str
    span: Span
    batch: Batch
    grad: Part | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they travel, each under the name of what it is here."""
        batch = self.batch
        found = zip(_PARTS, (batch.hidden, batch.mask, batch.positions, batch.prompts, self.grad), strict=True)
        return tuple(
            part if part.name == name else replace(part, name=name) for name, part in found if part is not None
        )

    @property
    def rows(self) -> int:
        return self.batch.hidden.shape[0]

    @property
    def tokens(self) -> int:
        """Per row, padding included."""
        return self.batch.hidden.shape[1]

    def digest(self, parts_digest: bytes | None = None) -> bytes:
        """What was asked, whatever the id of the call; ``parts_digest`` is a message's, where there is one: bodies are hashed once."""
        described = [[part.name, part.dtype, list(part.shape)] for part in self.parts]
        asked = [self.kind, self.model, self.compute_class, self.span.start, self.span.end, described]
        packed: bytes = msgpack.packb([*asked, parts_digest or digest_of(self.parts)])
        return hashlib.sha256(packed).digest()

    def to_message(self) -> Message:
        header = {
            "call": self.call,
            "model": bytes(self.model),
            "class": self.compute_class,
            "span": [self.span.start, self.span.end],
        }
        return Message(self.kind, header, self.parts, parts_digest=digest_of(self.parts))


def decode_call(message: Message) -> CallRequest:
    """Raises CallFault ``bad-request`` or ``too-large``, naming what is wrong."""
    try:
        return _decoded(message)
    except BadMessage as error:
        raise CallFault("bad-request", f"The call can't be read: {error}.") from None


def _decoded(message: Message) -> CallRequest:
    header = message.header
    if message.kind not in (FORWARD, BACKWARD):
        raise BadMessage(f"there is no call {message.kind[:32]!r}")
    edges = read_list(header, "span", 2)
    if len(edges) != 2:
        raise BadMessage("span is two blocks")
    ends = {"start": edges[0], "end": edges[1]}
    start = read_integer(ends, "start", 0, limits.BLOCKS_MAX)
    end = read_integer(ends, "end", start + 1, limits.BLOCKS_MAX)
    parts = _by_name(message)
    request = CallRequest(
        message.kind,
        read_bytes(header, "call", CALL_ID_BYTES),
        ModelId(read_bytes(header, "model", MODEL_ID_BYTES)),
        read_text(header, "class", limits.NAME_CHARS_MAX),
        Span(start, end),
        Batch(parts["hidden"], parts.get("mask"), parts.get("positions"), parts.get("prompts")),
        parts.get("grad"),
    )
    if (request.grad is not None) != (request.kind == BACKWARD):
        raise BadMessage("backward has a grad, and forward has none")
    check_shapes(request)
    return request


def _by_name(message: Message) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for part in message.parts:
        if part.name not in _PARTS or part.name in parts:
            raise BadMessage("its parts are hidden, mask, positions, prompts and grad, each once")
        parts[part.name] = part
    if "hidden" not in parts:
        raise BadMessage("hidden is missing")
    if [part.name for part in message.parts] != [name for name in _PARTS if name in parts]:
        raise BadMessage("its parts are out of order")
    return parts


def check_shapes(request: CallRequest) -> None:
    """Whether the parts agree with each other. Raises BadMessage, or CallFault ``too-large``."""
    batch, hidden = request.batch, request.batch.hidden
    if len(hidden.shape) != 3 or 0 in hidden.shape:
        raise BadMessage("hidden is (rows, tokens, d_model), none of them 0")
    rows, tokens, width = hidden.shape
    if rows * tokens > CALL_TOKENS_MAX:
        raise CallFault("too-large", f"A call has at most {CALL_TOKENS_MAX} tokens; send fewer rows at once.")
    for part, dtype in ((batch.mask, "uint8"), (batch.positions, "int32")):
        if part is not None and (part.shape != (rows, tokens) or part.dtype != dtype):
            raise BadMessage(f"{part.name} is (rows, tokens) of {dtype}")
    if batch.mask is not None and bytes(batch.mask.data).translate(None, _MASK_VALUES):
        raise BadMessage("a mask is of 0 and 1")
    prompts = batch.prompts
    if prompts is not None:
        if len(prompts.shape) != 3 or prompts.shape[0] != len(request.span) or prompts.shape[2] != width:
            raise BadMessage("prompts are (blocks, length, d_model)")
        if not 0 < prompts.shape[1] <= tokens or prompts.dtype != hidden.dtype:
            raise BadMessage("prompts are no longer than the tokens, and of the same dtype as hidden")
    if request.grad is not None and (request.grad.shape != hidden.shape or request.grad.dtype != hidden.dtype):
        raise BadMessage("grad has the shape and dtype of hidden")


def check_against(request: CallRequest, offer: Offer) -> None:
    """Whether a server can compute the call. Raises CallFault."""
    hidden, positions = request.batch.hidden, request.batch.positions
    if not offer.span.covers(request.span):
        raise CallFault("not-served", f"This server has blocks {offer.span}, not {request.span}.")
    if hidden.shape[2] != offer.width or hidden.dtype != offer.dtype:
        raise CallFault("bad-request", f"A boundary of this model is {offer.width} of {offer.dtype}.")
    if request.tokens > offer.max_positions:
        raise CallFault("unsupported", f"A row has {request.tokens} tokens; this model runs {offer.max_positions}.")
    if positions is not None:
        values = memoryview(positions.data).cast("B").cast("i")
        if min(values) < 0 or max(values) >= offer.max_positions:
            raise CallFault("bad-request", f"Positions are from 0 to {offer.max_positions - 1}.")


def reserved_bytes(decoded_bytes: int) -> int:
    """What a call takes at its server, from the sizes of its parts: the request, an answer as large, and what a call takes at all."""
    return 2 * decoded_bytes + CALL_OVERHEAD_BYTES


def expected_parts(request: CallRequest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each part of the answer."""
    batch = request.batch
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"hidden": (batch.hidden.dtype, batch.hidden.shape)}
    if request.kind == BACKWARD and batch.prompts is not None:
        expected["prompts"] = ("float32", batch.prompts.shape)
    return expected


def answer_message(request: CallRequest, digest: bytes, hidden: Part, prompts: Part | None) -> Message:
    """`output` or `gradients`."""
    kind = OUTPUT if request.kind == FORWARD else GRADIENTS
    parts = (hidden,) if prompts is None else (hidden, prompts)
    return Message(kind, {"call": request.call, "digest": digest}, parts)


def fault_of_answer(request: CallRequest, digest: bytes, answer: Message) -> str | None:
    """What is wrong with an answer, in words; None when it is one to ``request``."""
    if answer.kind != (OUTPUT if request.kind == FORWARD else GRADIENTS):
        return "a message of another kind"
    if answer.header.get("call") != request.call or answer.header.get("digest") != digest:
        return "another call's answer"
    found = {part.name: (part.dtype, part.shape) for part in answer.parts}
    if found != expected_parts(request) or len(found) != len(answer.parts):
        return "tensors of other shapes than were asked for"
    return None


def micro_batches(
    rows: int, tokens: int, row_bytes: int, tokens_max: int, bytes_max: int = CALL_BYTES_MAX // 2
) -> list[tuple[int, int]]:
    """Runs of rows, in order, of at most ``tokens_max`` tokens, and of so few bytes that a `backward` fits a call; at least one row.

    Raises:
        CallFault: ``too-large``, a single row is too long, with the length that would fit.
    """
    if 2 * row_bytes > bytes_max or tokens > CALL_TOKENS_MAX:
        fits = min(CALL_TOKENS_MAX, tokens * bytes_max // max(1, 2 * row_bytes))
        raise CallFault("too-large", f"A row has {tokens} tokens; {fits} fit into a call. Shorten it.")
    step = max(1, min(tokens_max // tokens, bytes_max // (2 * row_bytes)))
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


def rows_of(part: Part, start: int, stop: int) -> Part:
    """Rows [start, stop) of a part, over the same bytes."""
    if (start, stop) == (0, part.shape[0]):
        return part
    row = DTYPE_BYTES[part.dtype] * math.prod(part.shape[1:])
    view = memoryview(part.data).cast("B")[start * row : stop * row]
    return Part(part.name, part.dtype, (stop - start, *part.shape[1:]), view)


def batch_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows [start, stop) of a batch; prompts belong to all of them."""

    def cut(part: Part | None) -> Part | None:
        return None if part is None else rows_of(part, start, stop)

    return Batch(rows_of(batch.hidden, start, stop), cut(batch.mask), cut(batch.positions), batch.prompts)
