"""The client against servers that answer as written: real sockets, wrong and right answers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from peerd.client import ApiError, BadAnswer, Client, ClientError, DaemonLost, DaemonNotRunning, SocketRefused

OK = b"HTTP/1.1 200 OK\r\n"


@contextlib.contextmanager
def replying(path: Path, answer: bytes) -> Iterator[Client]:
    """A server that answers one request with these bytes, then closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with listener:
            yield Client(path, timeout_s=5)
    finally:
        thread.join(10)


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b'Content-Length: 9\r\n\r\n{"a": "b"',
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b'{"a"', b': "b"')[:-5],
        OK + b"Transfer-Encoding: chunked\r\n\r\n8\r\n{",
        OK,
        b"",
    ],
)
def test_an_answer_that_breaks_off_is_a_lost_daemon_or_a_bad_answer(tmp_path: Path, answer: bytes) -> None:
    with replying(tmp_path / "s", answer) as client, pytest.raises((DaemonLost, BadAnswer)) as caught:
        client.status()
    assert caught.value.exit_code in (4, 5)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: 2\r\n\r\n[]",
        OK + b"Content-Length: 3\r\n\r\nabc",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
        OK + b"a: b\r\n" * 200,
        OK + b"a" * 40000,
    ],
)
def test_an_answer_that_is_no_answer_is_told(tmp_path: Path, answer: bytes) -> None:
    with replying(tmp_path / "s", answer) as client, pytest.raises(BadAnswer):
        client.status()


@pytest.mark.parametrize("head", [b'Content-Length: 10\r\n\r\n{"a": "b"}', b'\r\n{"a": "b"}'])
def test_bodies_with_and_without_a_length_are_read(tmp_path: Path, head: bytes) -> None:
    with replying(tmp_path / "s", OK + head) as client:
        assert client.status() == {"a": "b"}


def test_a_body_in_chunks_is_put_together(tmp_path: Path) -> None:
    answer = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b'{"a"', b': "b"', b"}")
    with replying(tmp_path / "s", answer) as client:
        assert client.status() == {"a": "b"}


def test_a_stream_that_ends_without_done_is_a_lost_daemon(tmp_path: Path) -> None:
    answer = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b'data: {"n": 1}\n\n')
    with replying(tmp_path / "s", answer) as client:
        events = client.stream("/v1/completions", {})
        assert next(events) == {"n": 1}
        with pytest.raises(DaemonLost):
            next(events)


def test_an_error_without_a_reason_is_still_an_error(tmp_path: Path) -> None:
    with (
        replying(tmp_path / "s", b"HTTP/1.1 502 X\r\nContent-Length: 2\r\n\r\n{}") as client,
        pytest.raises(ApiError) as e,
    ):
        client.status()
    assert e.value.http_status == 502


def test_no_daemon_is_advice(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match=r"is it running\? Start it with `peerd start`") as caught:
        Client(tmp_path / "s").status()
    assert caught.value.exit_code == 3


def test_a_path_too_long_for_a_socket_is_advice(tmp_path: Path) -> None:
    with pytest.raises(SocketRefused, match="too long"):
        Client(tmp_path / ("x" * 200)).status()


def test_the_library_needs_nothing_but_python() -> None:
    script = (
        "import sys, peerd.client\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "ours = {name for name in sys.modules if name.split('.')[0] == 'peerd'}\n"
        "allowed = {'peerd', 'peerd.client', 'peerd.version', 'peerd.exit_codes'}\n"
        "wrong = [n for n in sorted(loaded) if n not in sys.stdlib_module_names and not n.startswith('__') and n != 'peerd']\n"
        "wrong += [n for n in sorted(ours) if n not in allowed and not n.startswith('peerd.client.')]\n"
        "wrong += sorted(loaded & {'asyncio', 'http', 'ssl', 'email'})\n"
        "sys.exit(f'loaded {wrong}' if wrong else 0)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_error_of_the_library_is_a_client_error() -> None:
    for kind in (ApiError, BadAnswer, DaemonLost, DaemonNotRunning, SocketRefused):
        assert issubclass(kind, ClientError)
