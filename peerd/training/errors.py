"""What can be wrong with a training job: each error is one sentence for a person and one stable code."""

from __future__ import annotations

from overlay.errors import Blame, PeerdError


class BadDataset(PeerdError):
    """Lines that can't be trained on; the sentence names them."""

    code = "bad-dataset"
    exit_code = 70
    http_status = 400
    blame = Blame.USER


class BadSettings(PeerdError):
    """A setting that can't be meant; ``param`` names it."""

    code = "bad-settings"
    exit_code = 2
    http_status = 400
    blame = Blame.USER

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class JobExists(PeerdError):
    """The name is taken, by a job or by an adapter."""

    code = "job-exists"
    exit_code = 71
    http_status = 409
    blame = Blame.USER


class UnknownJob(PeerdError):
    """No job has this name."""

    code = "unknown-job"
    exit_code = 72
    http_status = 404
    blame = Blame.USER


class JobEnded(PeerdError):
    """What was asked of a job doesn't go with its state."""

    code = "job-state"
    exit_code = 73
    http_status = 409
    blame = Blame.USER


class TooManyJobs(PeerdError):
    """The queue of jobs, or the memory of old ones, is full."""

    code = "too-many-requests"
    exit_code = 61
    http_status = 429
    retryable = True
    blame = Blame.US


class CheckpointFailed(PeerdError):
    """A checkpoint could not be written; the one before it is whole."""

    code = "disk-full"
    exit_code = 45
    http_status = 507
    blame = Blame.US


class BadCheckpoint(PeerdError):
    """What is on disk is no checkpoint of this job."""

    code = "bad-checkpoint"
    exit_code = 74
    http_status = 500
    blame = Blame.US


class Diverged(PeerdError):
    """Step after step gave values that are not finite."""

    code = "diverged"
    exit_code = 75
    http_status = 500
    blame = Blame.USER
