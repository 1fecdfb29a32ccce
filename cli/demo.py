"""`peerd demo`: a swarm on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cli.handover import become_daemon


def run(prog: str, arguments: Sequence[str]) -> int:
    """Check that there are no flags, then become the demo."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Start four daemons that share the demo model and one that only asks, stream a few answers, check them "
        "against local transformers, and kill a server in mid-sentence. Everything is cleaned up at the end.",
        allow_abbrev=False,
    )
    parser.parse_args(arguments)
    become_daemon("demo", arguments)
