"""`peerctl`: everything that talks to a running daemon."""

from __future__ import annotations

import sys

from cli.dispatch import Command, dispatch

COMMANDS = {
    "generate": Command("cli.generate", "continue or answer a prompt, as a stream"),
    "status": Command("cli.status", "the daemon: its id, addresses, models, sessions"),
    "swarm": Command("cli.swarm", "which blocks are covered by whom"),
}


def main() -> int:
    """The console script."""
    return dispatch("peerctl", "Talk to the running daemon.", COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
