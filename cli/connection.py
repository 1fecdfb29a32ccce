"""Which daemon a command talks to: `--socket`, `--state-dir`, the environment, or the usual place."""

from __future__ import annotations

import argparse
import os

from peerd.client import Client
from peerd.client.locate import socket_path


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every command of a running daemon has."""
    group = parser.add_argument_group("which daemon")
    group.add_argument("--socket", metavar="PATH", help="its socket (default: PEERD_SOCKET, else the usual place)")
    group.add_argument("--state-dir", metavar="DIR", help="the state directory that it was started with")


def client_for(flags: argparse.Namespace) -> Client:
    """A client for the daemon that the flags name; it connects at its first call."""
    return Client(os.path.abspath(socket_path(os.environ, flags.state_dir, flags.socket)))
