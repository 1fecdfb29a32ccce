"""What the machines ask their shells to do, and what the driver tells its owner: frozen values, nothing else.

A driver's commands name an epoch and a hop index; a hop's name the channel that something came on, or the edge
that the hop owns. Shells carry them out in order. Streams belong to one epoch: a new route opens new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from blocks.protocol.device import ReleaseJob, SpanJob
from blocks.protocol.messages import Epoch
from overlay.errors import PeerdError
from overlay.rpc.types import Message, Part
from routing.types import Hop

# --- a driver's commands ---


@dataclass(frozen=True, slots=True)
class OpenHop:
    """Open the control stream to a hop (and the data stream, when ``hop_index`` is 0).

    Sends that follow are queued by the shell until the stream is there; if it can't be opened, or ends unasked,
    the shell calls `Driver.hop_lost`.
    """

    epoch: Epoch
    hop_index: int
    hop: Hop


@dataclass(frozen=True, slots=True)
class SendControl:
    """Send on the control stream of a hop, of that epoch."""

    epoch: Epoch
    hop_index: int
    message: Message


@dataclass(frozen=True, slots=True)
class SendData:
    """Send on the data stream to hop 0, of that epoch."""

    epoch: Epoch
    message: Message


@dataclass(frozen=True, slots=True)
class CloseHops:
    """Finish and close every stream of ``epoch``, after what was queued on it."""

    epoch: Epoch


DriverCommand = OpenHop | SendControl | SendData | CloseHops

# --- a driver's events ---


@dataclass(frozen=True, slots=True)
class RouteReady:
    """Every hop is ready: windows flow. At most ``window_tokens`` tokens fit one window.

    ``windows`` may be under way at once; the driver never asks for a rollback of more than ``rollback_tokens``.
    """

    epoch: Epoch
    windows: int
    window_tokens: int
    rollback_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one turn: the rows that its `want` asked for, or None when it asked for none."""

    turn: int
    position: int
    tokens: int
    hidden: Part | None


@dataclass(frozen=True, slots=True)
class RouteLost:
    """The route of ``epoch`` no longer works; said once per epoch. Plan, call `Driver.open`, send all tokens again.

    With ``edge`` the fault is between hops ``hop_index`` and ``edge`` (the driver is hop ``len(route)``, and -1);
    without, ``hop_index`` failed; with neither, nobody can be named. `error.blame` says who pays.
    """

    epoch: Epoch
    hop_index: int | None
    edge: int | None
    error: PeerdError


@dataclass(frozen=True, slots=True)
class Moving:
    """Hop ``hop_index`` leaves within ``deadline_s``: plan without it and `Driver.open` at the next token."""

    epoch: Epoch
    hop_index: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The session can't go on, on any route (another process of the same driver took it over)."""

    error: PeerdError


DriverEvent = RouteReady | Output | RouteLost | Moving | Ended

# --- a hop's commands ---


class EdgeKey(NamedTuple):
    """The outbound data stream of one hop of one session, of one epoch."""

    session: bytes
    hop_index: int
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class OpenNext:
    """Open the data stream of ``edge`` to ``peer``; for the last hop that's the driver (``to_driver``).

    Towards the driver, its own connection is used first. Sends that follow are queued by the shell (the session's
    credits bound them); if the stream can't be opened, or ends unasked, the shell calls `Hops.next_lost`.
    """

    edge: EdgeKey
    peer: bytes
    addresses: tuple[str, ...]
    to_driver: bool


@dataclass(frozen=True, slots=True)
class SendNext:
    """Send on the data stream of ``edge``."""

    edge: EdgeKey
    message: Message


@dataclass(frozen=True, slots=True)
class CloseNext:
    """Finish and close the data stream of ``edge``."""

    edge: EdgeKey


@dataclass(frozen=True, slots=True)
class Reply:
    """Send on the channel that something came on, in the other direction."""

    channel: object
    message: Message


@dataclass(frozen=True, slots=True)
class Submit:
    """Give ``job`` to the device; a `SpanJob`'s result comes back through `Hops.job_done`, with that very job."""

    job: SpanJob | ReleaseJob


@dataclass(frozen=True, slots=True)
class CloseChannel:
    """End a channel: with ``code`` as a reset that costs the peer, with an empty one in good order."""

    channel: object
    code: str


HopCommand = OpenNext | SendNext | CloseNext | Reply | Submit | CloseChannel
