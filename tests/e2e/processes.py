"""Real daemons of one network, for the end-to-end tests: started once, watched from outside, and read to the end of their logs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peerd.client import Client
from peerd.loopback import Daemon, start_daemon


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll what other processes bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Network:
    """Daemons that know each other by the first; ``daemons`` are all that were ever started, ``by_name`` the latest of each name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[Daemon] = []
        self.by_name: dict[str, Daemon] = {}

    def start(
        self, name: str, *arguments: str, joins: bool = True, listen: str | None = "/ip4/127.0.0.1/tcp/0"
    ) -> Daemon:
        """Start a daemon in a state directory that no other had, and wait until it is ready."""
        join = ("--join", self.daemons[0].join_address) if self.daemons and joins else ()
        directory = self.directory / str(len(self.daemons))
        daemon = start_daemon(name, directory, *arguments, *join, listen=listen)
        self.add(daemon)
        return daemon

    def add(self, daemon: Daemon) -> None:
        self.daemons.append(daemon)
        self.by_name[daemon.name] = daemon
        daemon.wait_ready()

    def client(self, name: str = "client") -> Client:
        return Client(self.by_name[name].socket_path)

    def servers(self, model: str) -> list[dict[str, Any]]:
        """Live servers of a model as the client sees them; a killed one's record may stand for its minute."""
        live = " ".join(daemon.join_line for daemon in self.daemons if daemon.process.poll() is None)
        listed = [found for found in self.client().swarm()["models"] if found["name"] == model]
        return [server for found in listed for server in found["servers"] if server["peer"] in live]

    def replicas(self, model: str, blocks: int) -> list[int]:
        """How many live servers each block has online."""
        spans = [span_of(server) for server in self.servers(model) if server["state"] == "online"]
        return [sum(start <= block < end for start, end in spans) for block in range(blocks)]

    def gauge(self, name: str, gauge: str) -> float:
        """One figure from a daemon's metrics."""
        matched = re.search(rf"^peerd_{gauge} (\S+)", self.client(name).metrics(), re.MULTILINE)
        assert matched is not None
        return float(matched.group(1))

    def check_logs(self) -> None:
        """Nothing that any daemon went through is worth a traceback."""
        for daemon in self.daemons:
            assert "Traceback" not in daemon.log_path.read_text(), f"{daemon.name}\n{daemon.log_tail(60)}"


def span_of(server: dict[str, Any]) -> tuple[int, int]:
    start, end = (int(edge) for edge in server["span"].split(":"))
    return start, end


def peer_of(daemon: Daemon) -> str:
    return daemon.join_address.rsplit("/", 1)[1]


def greedy(
    client: Client, body: dict[str, Any], on_token: Callable[[int], None] | None = None
) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a greedy completion stream, and what its last event tells."""
    ids: list[int] = []
    facts: dict[str, Any] = {}
    for event in client.stream("/v1/completions", {"temperature": 0, "return_token_ids": True, **body}):
        for choice in event.get("choices", ()):
            ids += choice.get("token_ids") or ()
        facts = event.get("peerd") or facts
        if on_token is not None:
            on_token(len(ids))
    return ids, facts
