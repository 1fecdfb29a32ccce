"""What can go wrong at a device, told apart by what helps."""

from __future__ import annotations

from overlay.errors import Blame, PeerdError


class DeviceBusy(PeerdError):
    """The queue is full, or the memory is; trying later, or elsewhere, helps."""

    code = "busy"
    exit_code = 64
    http_status = 503
    retryable = True
    blame = Blame.NETWORK


class ComputeFailed(PeerdError):
    """A job broke: our own bug or our own hardware, from where the job ran."""

    code = "compute-failed"
    exit_code = 1
    http_status = 500
    retryable = True
    blame = Blame.US


class NotLoaded(PeerdError):
    """The model that a job names isn't on the device (any more)."""

    code = "not-served"
    exit_code = 1
    http_status = 503
    retryable = True
    blame = Blame.US
