"""One HTTP/1.1 request over a Unix socket, with the answer read as it comes.

Standard library only and small on purpose: ``http.client`` would double the memory and the start time of `peerctl`. Speaks what the
daemon's server sends: a status line, headers, and a body with a length, in chunks, or up to the end of the connection.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Sequence
from types import TracebackType

from peerd.client.errors import BadAnswer, DaemonLost, DaemonNotRunning, SocketRefused
from peerd.version import VERSION

LINE_BYTES_MAX = 16 << 10
HEADERS_MAX = 100
CHUNK_BYTES_MAX = 16 << 20
BODY_BYTES_MAX = 64 << 20
READ_BYTES = 64 << 10


class Response:
    """The answer to one request; a context manager that closes the connection, which cancels what the daemon does for it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")
        self.status = 0
        self.headers: dict[str, str] = {}

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()

    def read_head(self) -> None:
        """Read the status line and the headers."""
        version, _, rest = self._line().partition(" ")
        status = rest[:3]
        if not version.startswith("HTTP/1.") or not status.isdecimal():
            raise BadAnswer("What answers at the daemon's socket doesn't speak HTTP; is PEERD_SOCKET right?")
        self.status = int(status)
        for _ in range(HEADERS_MAX):
            line = self._line()
            if not line:
                return
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        raise BadAnswer("The daemon's answer has too many headers.")

    def pieces(self) -> Iterator[bytes]:
        """The body, each piece as soon as it is there."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            yield from self._chunks()
            return
        length = self.headers.get("content-length")
        if length is not None and not length.isdecimal():
            raise BadAnswer("The daemon's answer has no sound length.")
        left = int(length) if length is not None else BODY_BYTES_MAX
        while left:
            piece = self._read(min(left, READ_BYTES))
            if not piece:
                if length is None:
                    return
                raise _lost()
            left -= len(piece)
            yield piece

    def body(self, bytes_max: int = BODY_BYTES_MAX) -> bytearray:
        """The whole body. Raises BadAnswer over ``bytes_max``."""
        collected = bytearray()
        for piece in self.pieces():
            collected += piece
            if len(collected) > bytes_max:
                raise BadAnswer("The daemon's answer is too large.")
        return collected

    def _chunks(self) -> Iterator[bytes]:
        while True:
            size_text = self._line().partition(";")[0].strip()
            try:
                size = int(size_text, 16)
            except ValueError:
                size = -1
            if not 0 <= size <= CHUNK_BYTES_MAX:
                raise BadAnswer("The daemon's answer has a malformed chunk.")
            if size == 0:
                return
            data = self._read(size + 2, exactly=True)
            yield data[:-2]

    def _line(self) -> str:
        try:
            line = self._file.readline(LINE_BYTES_MAX)
        except TimeoutError as error:
            raise _silent() from error
        except OSError as error:
            raise _lost() from error
        if not line.endswith(b"\n"):
            raise _lost() if len(line) < LINE_BYTES_MAX else BadAnswer("The daemon's answer has a line without an end.")
        return line.rstrip(b"\r\n").decode("latin-1")

    def _read(self, count: int, *, exactly: bool = False) -> bytes:
        try:
            data = self._file.read(count) if exactly else self._file.read1(count)
        except TimeoutError as error:
            raise _silent() from error
        except OSError as error:
            raise _lost() from error
        if exactly and len(data) != count:
            raise _lost()
        return data


def connect(path: str, timeout_s: float) -> socket.socket:
    """A connected socket. Raises DaemonNotRunning or SocketRefused with advice."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if error.errno in (errno.EACCES, errno.EPERM):
            raise SocketRefused(
                f"Not allowed to use the daemon's socket {path}; run this as the user who started the daemon."
            ) from error
        if error.errno is None:  # Python itself refuses paths over the platform's limit
            raise SocketRefused(f"{path} is too long for a Unix socket; choose a shorter PEERD_SOCKET.") from error
        raise DaemonNotRunning(path) from error
    return connection


def request(
    path: str,
    method: str,
    target: str,
    body: bytes | Sequence[bytes | bytearray | memoryview] | None,
    timeout_s: float,
    content_type: str = "application/json",
) -> Response:
    """Send one request and read the head of its answer; ``timeout_s`` bounds every silence after that, too.

    A body may come in pieces, which are sent from where they lie.
    """
    connection = connect(path, timeout_s)
    response = Response(connection)
    head = f"{method} {target} HTTP/1.1\r\nHost: peerd\r\nUser-Agent: peerctl/{VERSION}\r\nConnection: close\r\n"
    pieces = [body] if isinstance(body, bytes) else body or []
    if body is not None:
        head += f"Content-Type: {content_type}\r\nContent-Length: {sum(map(len, pieces))}\r\n"
    first, *rest = pieces or [b""]
    try:
        _send(connection, [head.encode("latin-1") + b"\r\n" + first, *rest])
        response.read_head()
    except BaseException:
        response.close()
        raise
    return response


def _send(connection: socket.socket, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
    try:
        for piece in pieces:
            connection.sendall(piece)
    except TimeoutError as error:
        raise _silent() from error
    except (BrokenPipeError, ConnectionResetError):
        # The daemon may refuse a body that is too large before it has read it all: its answer says so.
        return
    except OSError as error:
        raise _lost() from error


def _lost() -> DaemonLost:
    return DaemonLost(
        "The daemon went away before its answer was complete; see its log, and start it again if it ended."
    )


def _silent() -> DaemonLost:
    return DaemonLost("The daemon doesn't answer any more; see its log, or stop it and start it again.")
