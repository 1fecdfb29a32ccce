"""Copies of the messages of tensor calls: requests twice, first, of other bytes, too late; answers twice, early, late or another call's.

Owns a hook around `overlay.rpc.channel.MessageChannel` and the simulated device while it is entered, the list of cells (docs/training.md,
section 3), and what each copy of a request has to be answered. A copy is signed by its host and has a stream of its own wherever a second
request would end the first one's. What a driver makes of copied answers is seen in its gradients, which are the workload's to check.
"""

from __future__ import annotations

import asyncio
import random  # noqa: TID251 - a seeded generator
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import cast

from blocks.call_service import TENSORS_PROTOCOL
from blocks.protocol import calls
from blocks.protocol.device import BackwardJob, ForwardJob, Job
from netsim.hooks import Send, hooked
from netsim.loop import HOST
from netsim.mischief import COPY
from netsim.peers.node import NodePeer
from netsim.world import World
from overlay.errors import PeerdError
from overlay.identity import PeerId
from overlay.rpc.channel import MessageChannel
from overlay.rpc.limits import NONCE_BYTES
from overlay.rpc.types import Message, Part
from overlay.stream import Priority

REQUESTS, ANSWERS = (calls.FORWARD, calls.BACKWARD), (calls.OUTPUT, calls.GRADIENTS)
OPEN_S = 8.0
SOON_S = 0.02
"""A copy of other bytes begins so much later than the request, or it would be the first."""
LOOK_S = 0.001
HELD_S = 0.3
KEPT_S = (0.5, 20.0)
EXPIRED_S = 61.0
"""Answers are kept for 60 s (`blocks.protocol.call_table`)."""
LAST_COPY_S = EXPIRED_S + 15.0
CALLS_MAX = 4096

SERVER_CELLS = (
    "server.first", "server.same-stream", "server.running", "server.running-other", "server.running-reset",
    "server.kept", "server.kept-other", "server.expired", "server.expired-other",
)  # fmt: skip
DRIVER_CELLS = (
    "driver.output-duplicate", "driver.output-early", "driver.output-late", "driver.output-other-shape",
    "driver.progress-early", "driver.progress-duplicate", "driver.progress-late", "driver.progress-other",
    "driver.error-first", "driver.error-late",
)  # fmt: skip
CELLS = SERVER_CELLS + DRIVER_CELLS
REFUSED = {"server.expired": "call-expired"}
LOST = (
    "server.same-stream",
    "driver.output-early",
    "driver.output-other-shape",
    "driver.progress-other",
    "driver.error-first",
)
"""After these the driver has to ask elsewhere."""

Count = Callable[[str], None]
Complain = Callable[[str, str], None]
"""(host, what it did)"""


@dataclass(slots=True)
class _Call:
    """One call of a driver: the request as it was said, and the cell that is to be made of it."""

    driver: str
    server: PeerId
    request: Message
    cell: str
    first: bytes = b""
    """The bytes that its server met first under this id."""
    answer: bytes = b""
    copies_heard: int = 0


class CallMischief:
    """See the module. ``rate``: the share of calls of which a copy is made."""

    def __init__(self, world: World, draws: random.Random, rate: float, count: Count, complain: Complain) -> None:
        self._world = world
        self._draws = draws
        self._rate = rate
        self._count = count
        self._complain = complain
        self._made = dict.fromkeys(CELLS, 0)
        self._calls: dict[bytes, _Call] = {}
        self._answers: dict[str, Message] = {}
        """The answer before, by server."""
        self._asked: dict[tuple[str, bytes], dict[bytes, None]] = {}
        self._ran: Counter[tuple[str, bytes]] = Counter()
        self._send = MessageChannel.send

    def entered(self) -> AbstractContextManager[None]:
        """Every channel and every device of the process is hooked meanwhile."""
        return hooked(self._says, hears=self._hears, computes=self._computes)

    # --- what servers hear and compute ---

    def _hears(self, _: MessageChannel, message: Message) -> None:
        host, call = HOST.get(), self._calls.get(message.header.get("call") or b"")
        if host and call is not None and message.kind in REQUESTS:
            key = _key(message.parts)
            call.copies_heard += COPY in message.header
            call.first = call.first or key
            if key == call.first:
                self._asked.setdefault((host, key), {})[message.header["call"]] = None

    def _computes(self, job: Job) -> None:
        if not isinstance(job, ForwardJob | BackwardJob):
            return
        batch = job.batch
        grad = job.grad if isinstance(job, BackwardJob) else None
        parts = [part for part in (batch.hidden, batch.mask, batch.positions, batch.prompts, grad) if part is not None]
        key = (HOST.get(), _key(parts))
        self._ran[key] += 1
        asked = len(self._asked.get(key, ()))
        if self._ran[key] > asked:
            self._complain(key[0], f"computed a call for the {self._ran[key]}. time, and was asked {asked} times")

    # --- what is said ---

    def _says(self, channel: MessageChannel, message: Message, how: Mapping[str, bool], _: Send) -> None:
        host, identifier = HOST.get(), message.header.get("call")
        if not host or not isinstance(identifier, bytes) or COPY in message.header:
            self._send(channel, message, **how)
        elif message.kind in REQUESTS:
            self._asks(host, identifier, channel, message, how)
        elif message.kind in ANSWERS:
            self._answers_call(host, identifier, channel, message, how)
        else:
            self._send(channel, message, **how)

    def _asks(
        self, host: str, identifier: bytes, channel: MessageChannel, message: Message, how: Mapping[str, bool]
    ) -> None:
        cell = ""
        if self._draws.random() < self._rate:
            _, _, cell = min((made, index, name) for index, (name, made) in enumerate(self._made.items()))
            self._made[cell] += 1
        call = self._calls[identifier] = _Call(host, channel.stream.remote_peer, message, cell)
        if len(self._calls) > CALLS_MAX:
            del self._calls[next(iter(self._calls))]
        if cell == "server.first":
            self._copy_after(0.0, call)
            self._world.loop.call_later(HELD_S, self._quietly, channel, message, dict(how))
            return
        self._send(channel, message, **how)
        if cell == "server.same-stream":
            self._quietly(channel, _copied(message, cell), dict(how))
            self._count(cell)
        elif cell.startswith("server.running"):
            self._copy_after(SOON_S if cell == "server.running-other" else 0.0, call)

    def _answers_call(
        self, host: str, identifier: bytes, channel: MessageChannel, message: Message, how: Mapping[str, bool]
    ) -> None:
        call = self._calls.get(identifier)
        cell = "" if call is None or call.answer else call.cell  # one copy of a call, and it is answered too
        if call is not None:
            self._compare(host, call, message)
        before, after = self._around(cell, host, message)
        for copy in before:
            self._quietly(channel, copy, {})
        self._send(channel, message, **how)
        for copy in after:
            self._quietly(channel, copy, {})
        if before or after:
            self._count(cell)
        if call is not None and cell.startswith(("server.kept", "server.expired")):
            late_s = self._draws.uniform(*KEPT_S) if cell.startswith("server.kept") else EXPIRED_S
            self._copy_after(late_s, call)
        if cell not in LOST:
            self._answers[host] = message

    def _around(self, cell: str, host: str, answer: Message) -> tuple[list[Message], list[Message]]:
        """What goes before an answer, and what after it."""
        mine = {key: answer.header[key] for key in ("call", "nonce")}
        former = self._answers.get(host)
        progress = Message(calls.PROGRESS, {**mine, "begun": 1, "of": 1})
        error = {"code": "failed", "message": "mischief", "retryable": True, "retry_after_s": None}
        failed = Message(calls.ERROR, {**mine, **error})
        made: dict[str, tuple[list[Message], list[Message]]] = {
            "driver.output-duplicate": ([], [answer]),
            "driver.output-early": ([former] if former is not None else [], []),
            "driver.output-late": ([], [former] if former is not None else []),
            "driver.output-other-shape": ([replace(answer, parts=(_cut(answer.parts[0]), *answer.parts[1:]))], []),
            "driver.progress-early": ([replace(progress, header={**progress.header, "begun": 99})], []),
            "driver.progress-duplicate": ([progress, progress], []),
            "driver.progress-late": ([], [progress]),
            "driver.progress-other": ([replace(progress, header={**progress.header, "call": bytes(16)})], []),
            "driver.error-first": ([failed], []),
            "driver.error-late": ([], [failed]),
        }
        before, after = made.get(cell, ([], []))
        return [_copied(one, cell) for one in before], [_copied(one, cell) for one in after]

    def _quietly(self, channel: MessageChannel, message: Message, how: Mapping[str, bool]) -> None:
        try:
            self._send(channel, message, **how)
        except PeerdError:
            return  # the stream ended meanwhile

    # --- copies of requests, on streams of their own ---

    def _copy_after(self, delay_s: float, call: _Call) -> None:
        machine = self._world.machines[call.driver]
        self._world.spawn(machine, self._ask_again(delay_s, call), "asks again")

    async def _ask_again(self, delay_s: float, call: _Call) -> None:
        """Ask once more, and hold the answer against the table."""
        await asyncio.sleep(delay_s)
        cell, host = call.cell, cast(NodePeer, self._world.machines[call.driver].peer).host
        request = call.request
        if cell.endswith("-other"):
            request = replace(request, parts=(_other(request.parts[0]), *request.parts[1:]), parts_digest=None)
        nonce = host.ports.randomness.token(NONCE_BYTES)
        copy = _copied(replace(request, header={**request.header, "nonce": nonce}), cell)
        try:
            stream = await host.open_stream(call.server, TENSORS_PROTOCOL, priority=Priority.BULK, timeout_s=OPEN_S)
            channel = MessageChannel(stream, host.identity, message_bytes_max=calls.CALL_BYTES_MAX)
            self._send(channel, copy, end=True)
            self._count(cell)
            if cell == "server.running-reset":  # while the call runs, if it runs for longer than the way there and back
                while not call.copies_heard and not call.answer:  # noqa: ASYNC110 - virtual time is cheap
                    await asyncio.sleep(LOOK_S)
                channel.reset("given-up")
                return
            answer = await channel.receive()
            while answer.kind == calls.PROGRESS:
                answer = await channel.receive()
            channel.close()
        except PeerdError as error:
            self._complain(call.driver, f"the copy {cell} of a call ended with {error.code}: {error}")
            return
        self._judge(call, request, answer)

    def _judge(self, call: _Call, request: Message, answer: Message) -> None:
        wanted = REFUSED.get(call.cell, "conflict" if _key(request.parts) != call.first else "")
        got = str(answer.header.get("code")) if answer.kind == calls.ERROR else ""
        if got != wanted:
            self._complain(
                call.driver, f"{call.cell} was answered {got or answer.kind!r}, not {wanted or 'the answer'}"
            )
        elif not got:
            self._compare(call.driver, call, answer)

    def _compare(self, host: str, call: _Call, answer: Message) -> None:
        """All answers to one call are the same bytes."""
        key = _key(answer.parts)
        call.answer = call.answer or key
        if key != call.answer:
            self._complain(host, "a call has two different answers")


def _key(parts: tuple[Part, ...] | list[Part]) -> bytes:
    digest = sha256()
    for part in parts:
        digest.update(part.data)
    return digest.digest()


def _copied(message: Message, cell: str) -> Message:
    """To be signed anew, and marked."""
    header = {key: value for key, value in message.header.items() if key not in ("k", "f", "t", "p")}
    return replace(message, header={**header, COPY: cell}, header_bytes=None, signature=None, sender=b"", recipient=b"")


def _other(part: Part) -> Part:
    """The same shape and other numbers."""
    data = bytes(part.data)
    return Part(part.name, part.dtype, part.shape, data[4:] + data[:4])


def _cut(part: Part) -> Part:
    """Without its last row; of a single row without its last token."""
    rows, tokens, width = part.shape
    shape = (rows - 1, tokens, width) if rows > 1 else (rows, max(1, tokens - 1), width)
    size = part.size_bytes // (rows * tokens) * shape[0] * shape[1]
    return Part(part.name, part.dtype, shape, bytes(part.data)[:size])
