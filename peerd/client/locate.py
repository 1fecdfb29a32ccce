"""Where the daemon's state and socket are: one rule for the daemon and for everything that talks to it.

Pure: takes the environment as a mapping. DESIGN 9: ``$XDG_RUNTIME_DIR/peerd/peerd.sock``, else ``STATE_DIR/run/peerd.sock``; a given
state directory keeps its socket to itself.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

SOCKET_NAME = "peerd.sock"


def state_directory(environment: Mapping[str, str], given: str | None = None) -> str:
    """The state directory: as given, else ``$PEERD_STATE_DIR``, else ``$XDG_STATE_HOME/peerd``, else ``~/.local/state/peerd``."""
    chosen = given or environment.get("PEERD_STATE_DIR")
    if chosen:
        return _expanded(chosen, environment)
    # The XDG specification has relative values ignored.
    base = environment.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = posixpath.join(environment.get("HOME", "/"), ".local", "state")
    return posixpath.join(base, "peerd")


def socket_path(environment: Mapping[str, str], state_dir: str | None = None, socket: str | None = None) -> str:
    """The socket: a given one, then that of a given state directory, then the environment's, then the usual place.

    A flag goes before the environment: ``--state-dir`` with ``PEERD_SOCKET`` set means the state directory's socket.
    """
    if socket:
        return _expanded(socket, environment)
    if not state_dir and environment.get("PEERD_SOCKET"):
        return _expanded(environment["PEERD_SOCKET"], environment)
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if not state_dir and not environment.get("PEERD_STATE_DIR") and runtime.startswith("/"):
        return posixpath.join(runtime, "peerd", SOCKET_NAME)
    return posixpath.join(state_directory(environment, state_dir), "run", SOCKET_NAME)


def _expanded(path: str, environment: Mapping[str, str]) -> str:
    if path == "~" or path.startswith("~/"):
        return environment.get("HOME", "/") + path[1:]
    return path
