"""The errors of adapters; each is one sentence that says what to do."""

from __future__ import annotations

from overlay.errors import Blame, PeerdError


class BadAdapter(PeerdError):
    """A directory that is no adapter that can be used here, or values that can't become one."""

    code = "bad-adapter"
    exit_code = 80
    http_status = 400
    blame = Blame.USER


class WrongAdapter(BadAdapter):
    """An adapter for another base model."""

    code = "wrong-adapter"
    exit_code = 81


class UnknownAdapter(PeerdError):
    """No adapter has that name."""

    code = "unknown-adapter"
    exit_code = 82
    http_status = 404
    blame = Blame.USER


class AdapterExists(PeerdError):
    """The name is taken."""

    code = "adapter-exists"
    exit_code = 83
    http_status = 409
    blame = Blame.USER


class AdapterNotSaved(PeerdError):
    """The disk didn't take it; what was there before is whole."""

    code = "adapter-not-saved"
    exit_code = 84
    http_status = 507
