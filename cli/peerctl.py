"""`peerctl`: everything that talks to a running daemon."""

from __future__ import annotations

import sys

from cli.dispatch import Command, dispatch

COMMANDS = {
    "adapters": Command("cli.adapters", "the adapters of this machine: list, remove"),
    "generate": Command("cli.generate", "continue or answer a prompt, as a stream"),
    "jobs": Command("cli.jobs", "training jobs: list, watch, cancel, resume"),
    "status": Command("cli.status", "the daemon: its id, addresses, models, sessions"),
    "swarm": Command("cli.swarm", "which blocks are covered by whom"),
    "train": Command("cli.train", "train an adapter through the swarm"),
}


def main() -> int:
    """The console script."""
    return dispatch("peerctl", "Talk to the running daemon.", COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
