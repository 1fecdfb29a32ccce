"""The errors of the local API itself, and how any error looks in JSON.

The shape is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``, with ``retryable`` added; ``code`` is stable.
"""

from __future__ import annotations

from typing import Any

from overlay.errors import Blame, PeerdError


class InvalidRequest(PeerdError):
    """A request that can't be understood; ``param`` names the field that is meant."""

    code = "invalid-request"
    exit_code = 2
    http_status = 400
    blame = Blame.USER

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MalformedJson(InvalidRequest):
    """The body is no JSON object."""

    code = "malformed-json"


class UnsupportedParameter(InvalidRequest):
    """A parameter of the OpenAI API that this daemon doesn't have."""

    code = "unsupported-parameter"


class RequestTooLarge(PeerdError):
    """The body is over its limit."""

    code = "request-too-large"
    exit_code = 63
    http_status = 413
    blame = Blame.USER


class NotFound(PeerdError):
    """No such path, or not with this method."""

    code = "not-found"
    exit_code = 2
    http_status = 404
    blame = Blame.USER


class MethodNotAllowed(NotFound):
    """The path is there, for another method."""

    code = "method-not-allowed"
    http_status = 405


class Forbidden(PeerdError):
    """The process at the other end of the socket belongs to another user."""

    code = "forbidden"
    exit_code = 7
    http_status = 403
    blame = Blame.USER


class TooManyRequests(PeerdError):
    """More generations at once than this daemon takes."""

    code = "too-many-requests"
    exit_code = 61
    http_status = 429
    retryable = True


class BodiesFull(PeerdError):
    """Larger bodies are under way than this daemon holds at once."""

    code = "busy"
    exit_code = 64
    http_status = 503
    retryable = True

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TapeGone(PeerdError):
    """What forward kept is no longer here: send what it got along with the gradient."""

    code = "tape-gone"
    http_status = 410
    blame = Blame.USER


class SocketPathError(PeerdError):
    """A path that can't be a Unix socket here."""

    code = "socket-path"
    exit_code = 18
    http_status = 500
    blame = Blame.USER


class SocketDirectoryError(PeerdError):
    """The socket's directory isn't private to this user."""

    code = "socket-directory"
    exit_code = 19
    http_status = 500
    blame = Blame.USER


class SocketInUse(PeerdError):
    """A live daemon already answers at the socket."""

    code = "socket-in-use"
    exit_code = 17
    http_status = 500
    blame = Blame.USER


class InternalError(PeerdError):
    """Our own bug: the log has the details, the answer doesn't."""

    code = "internal"


_TYPES = {400: "invalid_request_error", 403: "permission_error", 429: "rate_limit_error"}


def error_document(error: PeerdError) -> dict[str, Any]:
    """The JSON of an error."""
    status = error.http_status
    length = getattr(error, "length", None)  # of a session that is shorter than its step says
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": getattr(error, "param", None),
            "code": error.code,
            "retryable": error.retryable,
            **({} if length is None else {"length": length}),
        }
    }
