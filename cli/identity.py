"""`peerd id`: this machine's peer id, made at the first call."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.handover import become_daemon


def run(prog: str, arguments: Sequence[str]) -> int:
    """Check the flags, then let the daemon's program answer: it owns the keys."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Print this machine's peer id; it is made when there is none yet.", allow_abbrev=False
    )
    parser.add_argument("--state-dir", metavar="DIR", help="where the identity is kept (default: as `peerd start`)")
    parser.parse_args(arguments)
    become_daemon("id", arguments)
