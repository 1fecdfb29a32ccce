"""The way from a light command to the daemon's program: this process becomes `python -m peerd`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def become_daemon(command: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process, so that signals and exit codes are the daemon's own.

    -P keeps the current directory out of the module path: a folder there that is called peerd must not be run.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "peerd", command, *arguments])
