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
JOB_FAILED = 8
OUTPUT_FAILED = 9
INTERRUPTED = 130
BROKEN_PIPE = 141

BY_ERROR_CODE = {
    "listen-failed": 10,
    "bad-identity": 11,
    "state-directory": 12,
    "state-in-use": 13,
    "too-little-memory": 14,
    "no-device": 15,
    "wrong-class": 16,
    "socket-in-use": 17,
    "socket-path": 18,
    "socket-directory": 19,
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
    "cache-full": 47,
    "blocks-unserved": 50,
    "blocks-pending": 51,
    "model-pending": 52,
    "model-required": 54,
    "model-unavailable": 55,
    "prompt-too-long": 60,
    "too-many-requests": 61,
    "stopping": 62,
    "request-too-large": 63,
    "busy": 64,
    "bad-dataset": 70,
    "job-exists": 71,
    "unknown-job": 72,
    "job-state": 73,
    "bad-checkpoint": 74,
    "diverged": 75,
    "bad-adapter": 80,
    "wrong-adapter": 81,
    "unknown-adapter": 82,
    "adapter-exists": 83,
    "adapter-not-saved": 84,
}
"""Errors that a person can meet and act on, each by its own number."""


def exit_code_of(error_code: str, http_status: int) -> int:
    """The exit code for an error that the daemon answered with."""
    if error_code in BY_ERROR_CODE:
        return BY_ERROR_CODE[error_code]
    return USAGE if 400 <= http_status < 500 else INTERNAL
