"""What the exit codes of `peerd` and `peerctl` mean; docs/cli.md shows the same table, and a test compares them.

Owns the codes of the commands themselves and the map from the daemon's error codes. Imports nothing, so that commands stay light.
"""

from __future__ import annotations

OK = 0
INTERNAL = 1
USAGE = 2
NOT_RUNNING = 3
DAEMON_LOST = 4
BAD_ANSWER = 5
STILL_RUNNING = 6
NOT_OURS = 7
INTERRUPTED = 130
BROKEN_PIPE = 141

BY_ERROR_CODE = {
    "listen-failed": 10,
    "socket-in-use": 11,
    "state-directory": 12,
    "state-in-use": 13,
    "socket-path": 14,
    "socket-directory": 15,
    "unreachable": 30,
    "upgrade-failed": 31,
    "connection-lost": 32,
    "timed-out": 36,
    "unknown-model": 40,
    "bad-model": 41,
    "unsupported-model": 42,
    "hub-refused": 43,
    "hub-unavailable": 44,
    "disk-full": 45,
    "bad-manifest": 46,
    "model-required": 48,
    "prompt-too-long": 50,
    "blocks-unserved": 51,
    "blocks-pending": 52,
    "busy": 53,
    "too-many-requests": 54,
    "stopping": 55,
    "request-too-large": 56,
}
"""Errors that a person can meet and act on, each by its own number."""


def exit_code_of(error_code: str, http_status: int) -> int:
    """The exit code for an error that the daemon answered with."""
    if error_code in BY_ERROR_CODE:
        return BY_ERROR_CODE[error_code]
    return USAGE if 400 <= http_status < 500 else INTERNAL
