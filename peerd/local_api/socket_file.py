"""The Unix socket as a file: private from its first moment, one live daemon at a time, nothing stale left in the way.

Owns the socket's directory, the lock beside it and the check of who is at the other end. The lock dies with its process, so a live
daemon and a dead one's leftovers can always be told apart. DESIGN 9.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from peerd.config import SOCKET_PATH_BYTES_MAX
from peerd.local_api.errors import SocketDirectoryError, SocketInUse, SocketPathError

BACKLOG = 128
PROBE_TIMEOUT_S = 1.0
_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED = 0, 1, "IIh"  # macOS, <sys/un.h> and <sys/ucred.h>


def check_socket_path(path: str) -> None:
    """Refuse a path that no socket can have here. Raises SocketPathError."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES_MAX:
        raise SocketPathError(
            f"The socket path {path} has {length} bytes and this system allows {SOCKET_PATH_BYTES_MAX}; give a shorter one with --socket."
        )


@contextlib.contextmanager
def listening_socket(path: Path) -> Iterator[socket.socket]:
    """A listening socket at ``path`` (0600, in a directory of mode 0700 that is ours); removed at the end.

    Raises:
        SocketPathError, SocketDirectoryError: with what to do about it.
        SocketInUse: a live process has it. What a dead one left behind is replaced.
    """
    check_socket_path(str(path))
    _prepare_directory(path.parent)
    with _locked(path):
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            try:
                # Nobody else can enter the directory, so the moment before chmod is nobody's chance.
                listener.bind(str(path))
                path.chmod(0o600)
            except OSError as error:
                raise SocketPathError(
                    f"Can't make the socket {path} ({error.strerror}); choose another with --socket."
                ) from error
            listener.listen(BACKLOG)
            listener.setblocking(False)
            yield listener
        finally:
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def peer_uid(connection: socket.socket) -> int | None:
    """The user at the other end of a Unix socket, or None where the system can't say."""
    try:
        if sys.platform == "darwin":
            size = struct.calcsize(_XUCRED)
            return int(struct.unpack(_XUCRED, connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, size))[1])
        data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", data)[1])
    except (OSError, struct.error):
        return None


def _prepare_directory(directory: Path) -> None:
    try:
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        status = directory.stat()
    except OSError as error:
        raise SocketDirectoryError(
            f"Can't use {directory} for the socket ({error.strerror}); choose another place with --socket."
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise SocketDirectoryError(f"{directory} is no directory; choose another place with --socket.")
    if status.st_uid != os.getuid():
        raise SocketDirectoryError(f"{directory} belongs to another user; choose another place with --socket.")
    if status.st_mode & 0o077:
        raise SocketDirectoryError(
            f"{directory} is open to other users; run `chmod 700 {directory}`, or choose another place with --socket."
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside the socket for as long as the daemon lives."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SocketDirectoryError(f"Can't write {path}.lock ({error.strerror}); choose another --socket.") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(path) from error
        yield
    finally:
        os.close(lock)


def _remove_stale(path: Path) -> None:
    """Remove a socket on which nobody listens; anything else at the path is left alone and refused."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketPathError(f"{path} is there and is no socket; remove it, or choose another place with --socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise _in_use(path) from error
        else:
            raise _in_use(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _in_use(path: Path) -> SocketInUse:
    return SocketInUse(
        f"A live daemon already answers at {path}; stop it with `peerd stop`, or give this one its own --state-dir or --socket."
    )
