"""`peerd stop`: ask the daemon to stop, and wait until its process has ended."""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from collections.abc import Sequence

from cli.connection import add_connection_flags, client_for
from peerd import exit_codes

DEFAULT_TIMEOUT_S = 60.0
POLL_S = 0.05


def run(prog: str, arguments: Sequence[str]) -> int:
    """Returns when the daemon is gone, or STILL_RUNNING after the timeout."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Stop the running daemon: it hands its sessions over, then ends; this waits for that.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="how long to wait (default: %(default)g s)",
    )
    add_connection_flags(parser)
    flags = parser.parse_args(arguments)
    client = client_for(flags)
    pid = client.status().get("pid")
    if not isinstance(pid, int) or pid <= 0:
        client.stop()
        return exit_codes.OK
    # Held from before the request, so that it can't come to mean another process.
    handle = _open_process(pid)
    try:
        client.stop()
        ended = _wait_ended(pid, handle, flags.timeout)
    finally:
        if handle is not None:
            os.close(handle)
    if not ended:
        print(
            f"{prog}: the daemon (pid {pid}) still runs after {flags.timeout:g} s; a second Ctrl-C or `kill {pid}` ends it at once.",
            file=sys.stderr,
        )
        return exit_codes.STILL_RUNNING
    print(f"stopped (pid {pid})")
    return exit_codes.OK


def _open_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _wait_ended(pid: int, handle: int | None, timeout_s: float) -> bool:
    if handle is not None:
        return bool(select.select([handle], [], [], timeout_s)[0])
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        time.sleep(POLL_S)
    return False
