"""What can go wrong between a command and its daemon: each error is a sentence with advice, and knows its exit code."""

from __future__ import annotations

from peerd import exit_codes


class ClientError(Exception):
    """The root; ``str(error)`` says what to do."""

    exit_code = exit_codes.INTERNAL


class DaemonNotRunning(ClientError):
    """Nobody answers at the socket."""

    exit_code = exit_codes.NOT_RUNNING

    def __init__(self, path: str) -> None:
        super().__init__(f"Failed to connect to the daemon at {path}; is it running? Start it with `peerd start`.")


class SocketRefused(ClientError):
    """The socket is there, but not for this user, or can't be a socket at all."""

    exit_code = exit_codes.NOT_OURS


class DaemonLost(ClientError):
    """The daemon went away, or fell silent, in the middle of an answer."""

    exit_code = exit_codes.DAEMON_LOST


class BadAnswer(ClientError):
    """What answers at the socket doesn't speak this version's language."""

    exit_code = exit_codes.BAD_ANSWER


class ApiError(ClientError):
    """The daemon refused or failed a request, and said why.

    Attributes:
        code: the stable code of the error.
        http_status: of the answer; 200 when the error came in the middle of a stream.
        param: the field of the request that is meant, or None.
    """

    def __init__(self, code: str, message: str, http_status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.http_status = http_status
        self.param = param

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # read only here: it follows from the code
        return exit_codes.exit_code_of(self.code, self.http_status)
