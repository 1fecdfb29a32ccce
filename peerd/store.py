"""The state directory: identity, incarnation, the port chosen once, peers known from last time.

Owns every file that a daemon keeps between runs and writes each atomically (temporary file, fsync, rename, directory
fsync). Must not know what the bytes mean beyond the small documents defined here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from overlay.errors import Blame, InvalidAddress, PeerdError
from overlay.multiaddr import Multiaddr
from overlay.ports import Storage

KNOWN_PEERS_AT_MOST = 64
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


class StateError(PeerdError):
    """The state directory can't be used."""

    code = "state-directory"
    exit_code = 12
    http_status = 500
    retryable = False
    blame = Blame.US


class StateInUse(StateError):
    """Another daemon holds the state directory."""

    code = "state-in-use"
    exit_code = 13


class FileStorage:
    """`overlay.ports.Storage` over one directory (mode 0700); files are 0600."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        return self._directory

    def load(self, name: str) -> bytes | None:
        """The bytes saved under ``name``, or None. Raises StateError when the file exists and can't be read.

        A file that others may read (copied back from a backup, say) is closed to them again.
        """
        try:
            with self._path(name).open("rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    os.fchmod(file.fileno(), 0o600)
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"Can't read {self._path(name)} ({error.strerror}); check its permissions.") from error

    def save(self, name: str, data: bytes) -> None:
        """Replace what is saved under ``name``; after return it survives a power cut."""
        path = self._path(name)
        temporary = path.with_name(path.name + ".new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            directory = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise StateError(
                f"Can't write {path} ({error.strerror}); free some disk space or choose another --state-dir."
            ) from error

    def _path(self, name: str) -> Path:
        if not name or not set(name) <= _NAME_CHARACTERS or name.startswith("."):
            raise ValueError(f"not a state file's name: {name!r}")
        return self._directory / name


def state_files(directory: Path) -> FileStorage:
    """The files of the state directory, which is created (0700) if it isn't there; takes no lock.

    Raises:
        StateError: it can't be created, or belongs to somebody else.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = directory.stat().st_uid
    except OSError as error:
        raise _unusable(directory, error) from error
    if owner != os.getuid():
        raise StateError(f"{directory} belongs to another user; give a --state-dir of your own.")
    return FileStorage(directory)


def _unusable(directory: Path, error: OSError) -> StateError:
    return StateError(
        f"Can't use {directory} as the state directory ({error.strerror}); give another with --state-dir."
    )


@contextlib.contextmanager
def opened_state(directory: Path) -> Iterator[FileStorage]:
    """Create (0700) and lock the state directory for one daemon.

    Raises:
        StateInUse: another live daemon has it. The lock dies with its process, so nothing stale can stay behind.
        StateError: it can't be created, or belongs to somebody else.
    """
    storage = state_files(directory)
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateInUse(
                f"Another peerd already uses {directory}; stop it with `peerd stop`, or give another --state-dir."
            ) from error
        yield storage
    finally:
        os.close(lock)


def next_incarnation(storage: Storage) -> int:
    """A number greater than every earlier one of this state directory, on disk before it is returned (DESIGN 5)."""
    saved = storage.load("incarnation")
    current = int(saved) if saved is not None and saved.isdigit() and len(saved) < 19 else 0
    storage.save("incarnation", b"%d" % (current + 1))
    return current + 1


def load_known_peers(storage: Storage) -> tuple[str, ...]:
    """Multiaddrs of peers from last time; a damaged file counts as none, and what is no address is left out."""
    saved = storage.load("known-peers.json")
    if saved is None:
        return ()
    try:
        listed = json.loads(saved)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(listed, list):
        return ()
    return tuple(text for text in listed[:KNOWN_PEERS_AT_MOST] if _is_dialable(text))


def _is_dialable(text: object) -> bool:
    try:
        return isinstance(text, str) and Multiaddr.parse(text).is_tcp
    except InvalidAddress:
        return False


def save_known_peers(storage: Storage, addresses: Sequence[str]) -> None:
    """Remember the first `KNOWN_PEERS_AT_MOST` of ``addresses`` for the next start."""
    storage.save("known-peers.json", json.dumps(list(addresses[:KNOWN_PEERS_AT_MOST]), indent=1).encode())


def load_port(storage: Storage) -> int:
    """The listening port chosen at the first start, or 0."""
    saved = storage.load("port")
    port = int(saved) if saved is not None and saved.isdigit() and len(saved) <= 5 else 0
    return port if 0 < port < 65536 else 0


def save_port(storage: Storage, port: int) -> None:
    """Keep the listening port for every later start."""
    storage.save("port", b"%d" % port)
