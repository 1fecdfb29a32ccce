"""`peerd`: start, stop, id, demo."""

from __future__ import annotations

import sys

from cli.dispatch import Command, dispatch

COMMANDS = {
    "start": Command("cli.start", "run the daemon in the foreground"),
    "stop": Command("cli.stop", "stop the running daemon, and wait until it has ended"),
    "id": Command("cli.identity", "print this machine's peer id"),
    "demo": Command("cli.demo", "four daemons on this machine, a streamed answer, a killed server"),
}


def main() -> int:
    """The console script."""
    return dispatch(
        "peerd", "The daemon: joins a swarm, serves and uses spans of language models.", COMMANDS, sys.argv[1:]
    )


if __name__ == "__main__":
    sys.exit(main())
