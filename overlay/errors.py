"""The error tree's root, and the overlay's own errors.

Every error that can reach a user or a peer is a `PeerdError`: a stable wire code, a command's exit code, an HTTP status,
whether a retry can help, whom it blames, and one sentence that says what to do. Knows nothing above it.
"""

from __future__ import annotations

from enum import Enum


class Blame(Enum):
    """Whose fault an error is. Our own never counts against a peer; an edge's is neither end's."""

    US = "us"
    PEER = "peer"
    NETWORK = "network"
    USER = "user"
    EDGE = "edge"


class PeerdError(Exception):
    """The root. ``str(error)`` is one sentence that says what to do."""

    code: str = "internal"
    exit_code: int = 1
    http_status: int = 500
    retryable: bool = False
    blame: Blame = Blame.US


class DialError(PeerdError):
    """No address of a peer could be dialled."""

    code = "unreachable"
    exit_code = 30
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class UpgradeError(PeerdError):
    """A connection opened but could not be secured and multiplexed (wrong peer id, other network, garbage, time)."""

    code = "upgrade-failed"
    exit_code = 31
    http_status = 503
    retryable = True
    blame = Blame.PEER


class ConnectionLost(PeerdError):
    """The connection under a stream ended."""

    code = "connection-lost"
    exit_code = 32
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class StreamReset(PeerdError):
    """The other side (or this one) reset the stream."""

    code = "stream-reset"
    exit_code = 32
    http_status = 503
    retryable = True
    blame = Blame.PEER


class StreamClosed(PeerdError):
    """The stream ended in good order before what was expected had come, or was written to after its end."""

    code = "stream-closed"
    exit_code = 32
    http_status = 503
    retryable = True
    blame = Blame.PEER


class ProtocolRefused(PeerdError):
    """The peer doesn't speak the protocol that was asked for."""

    code = "protocol-refused"
    exit_code = 33
    http_status = 503
    retryable = False
    blame = Blame.PEER


class ProtocolViolation(PeerdError):
    """The peer broke a protocol: its stream or connection is ended."""

    code = "protocol-violation"
    exit_code = 34
    http_status = 502
    retryable = False
    blame = Blame.PEER


class LimitExceeded(PeerdError):
    """A named bound was reached."""

    code = "limit"
    exit_code = 35
    http_status = 503
    retryable = True
    blame = Blame.US


class InvalidAddress(PeerdError):
    """Text or bytes that are no multiaddr or peer id."""

    code = "bad-address"
    exit_code = 2
    http_status = 400
    retryable = False
    blame = Blame.USER


class TimedOut(PeerdError):
    """The peer did not answer within the deadline."""

    code = "timed-out"
    exit_code = 36
    http_status = 504
    retryable = True
    blame = Blame.NETWORK
