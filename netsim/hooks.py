"""What hosts say, hear and compute, seen from outside: `MessageChannel` and the simulated device are hooked, production isn't touched.

Whoever hooks decides what becomes of a message that is said; hooks within hooks see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from blocks.protocol.device import Job, JobResult
from netsim.devices import SimDevice
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message

Send = Callable[..., None]
"""`MessageChannel.send` as it was before, with the channel first."""
Says = Callable[[MessageChannel, Message, Mapping[str, bool], Send], None]
Hears = Callable[[MessageChannel, Message], None]


def _passed_by(*_: object) -> None:
    """Nobody looks."""


@contextmanager
def hooked(
    says: Says,
    *,
    hears: Hears = _passed_by,
    has_heard: Hears = _passed_by,
    computes: Callable[[Job], None] = _passed_by,
) -> Iterator[None]:
    """Every message channel and every simulated device of the process is hooked meanwhile.

    Args:
        says: Instead of `MessageChannel.send`; has to call what was there before, if the message is to go out.
        hears: Before a channel hands over a message that came; an answer may be said within.
        has_heard: After it did.
        computes: Before a device makes a job's result.
    """
    send, accept, result = MessageChannel.send, MessageChannel._accept, SimDevice._result

    def hooked_send(channel: MessageChannel, message: Message, **how: bool) -> None:
        says(channel, message, how, send)

    def hooked_accept(channel: MessageChannel, message: Message, sequence: int) -> None:
        hears(channel, message)
        accept(channel, message, sequence)
        has_heard(channel, message)

    def hooked_result(device: SimDevice, job: Job) -> JobResult:
        computes(job)
        return result(device, job)

    MessageChannel.send = hooked_send  # type: ignore[assignment, method-assign]
    MessageChannel._accept = hooked_accept  # type: ignore[assignment, method-assign]
    SimDevice._result = hooked_result  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        MessageChannel.send = send  # type: ignore[method-assign]
        MessageChannel._accept = accept  # type: ignore[method-assign]
        SimDevice._result = result  # type: ignore[method-assign]
