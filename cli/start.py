"""`peerd start`: check the flags cheaply, then become the daemon."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cli.handover import become_daemon
from peerd import config


def run(prog: str, arguments: Sequence[str]) -> int:
    """Never returns when all is well: the daemon goes on in this process."""
    try:
        config.load(arguments)
    except config.ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    return become_daemon("start", arguments)
