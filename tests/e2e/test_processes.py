"""Real daemons as processes on loopback: the same text whatever is killed, frozen or stopped, and nothing left behind.

Starting daemons is what costs, so one swarm serves the whole module; a test that ends a server starts another in its place.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks.model.exact import Reference
from peerd.client import ApiError, Client
from peerd.loopback import Daemon, running, start_daemon
from tests.models import make_tiny

BLOCKS = 4
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 40
SPANS = {"first": "0:2", "second": "2:4", "replica": "2:4"}

pytestmark = pytest.mark.timeout(240)


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Poll what other processes bring about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Swarm:
    """Three servers of a directory model, and a client that has none of its files."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.daemons: list[Daemon] = []
        self.by_name: dict[str, Daemon] = {}
        self._count = 0

    def start(self, name: str, *arguments: str) -> Daemon:
        join = ("--join", self.daemons[0].join_address) if self.daemons else ()
        self._count += 1
        daemon = start_daemon(f"{name}{self._count}", self.directory, *arguments, *join)
        self.daemons.append(daemon)
        self.by_name[name] = daemon
        daemon.wait_ready()
        return daemon

    def serve(self, name: str) -> Daemon:
        return self.start(name, "--model", str(self.model), "--serve-blocks", SPANS[name])

    @property
    def client(self) -> Client:
        return Client(self.by_name["client"].socket_path)

    def replicas(self) -> list[int]:
        """Live servers of each block as the client sees them; a dead one's record may stand for its minute."""
        live = " ".join(daemon.join_line for daemon in self.daemons if daemon.process.poll() is None)
        for model in self.client.swarm()["models"]:
            if model["name"] == self.model.name:
                servers = [found for found in model["servers"] if found["state"] == "online" and found["peer"] in live]
                spans = [found["span"].split(":") for found in servers]
                return [sum(int(start) <= block < int(end) for start, end in spans) for block in range(BLOCKS)]
        return []

    def complete(self) -> None:
        """Replace what a test ended, and wait until all is online, the second half twice."""
        for name in SPANS:
            if name not in self.by_name or self.by_name[name].process.poll() is not None:
                self.serve(name)
        wait_until(lambda: self.replicas() == [1, 1, 2, 2])

    def busy(self) -> Daemon:
        """The server of the second half that the client's only session uses."""
        found: list[str] = []

        def look() -> bool:
            sessions = self.client.status()["sessions"]
            found[:] = [hop["peer"] for session in sessions for hop in session["route"] if hop["span"] == "2:4"]
            return bool(found)

        wait_until(look)
        return next(self.by_name[name] for name in ("second", "replica") if found[0] in self.by_name[name].join_line)

    def sessions_served(self, name: str) -> int:
        text = Client(self.by_name[name].socket_path).metrics()
        matched = re.search(r"^peerd_sessions_served (\d+)", text, re.MULTILINE)
        assert matched is not None
        return int(matched.group(1))


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    directory = tmp_path_factory.mktemp("e2e")
    model = make_tiny("llama", directory / "little", num_hidden_layers=BLOCKS, max_position_embeddings=2048)
    made = Swarm(directory, model)
    with running(made.daemons):
        made.serve("first")
        for name in ("second", "replica"):
            made.serve(name)
        made.start("client", "--serve-blocks", "none")
        made.complete()
        yield made
        for daemon in made.daemons:
            assert "Traceback" not in daemon.log_path.read_text(), daemon.name


@pytest.fixture(scope="module")
def expected(swarm: Swarm) -> list[int]:
    return Reference.load(str(swarm.model)).greedy(PROMPT, 2000)


def ask(swarm: Swarm, tokens: int, on_token: Callable[[int], None] | None = None) -> tuple[list[int], dict[str, Any]]:
    """Token ids of a greedy stream, and what its last event tells."""
    body = {"model": swarm.model.name, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    ids: list[int] = []
    facts: dict[str, Any] = {}
    for event in swarm.client.stream("/v1/completions", body):
        for choice in event.get("choices", ()):
            ids += choice.get("token_ids") or ()
        facts = event.get("peerd") or facts
        if on_token is not None:
            on_token(len(ids))
    return ids, facts


def test_a_client_without_files_gets_the_tokens_of_local_transformers(swarm: Swarm, expected: list[int]) -> None:
    ids, facts = ask(swarm, TOKENS)
    assert ids == expected[:TOKENS]
    assert [hop["span"] for hop in facts["route"]] == ["0:2", "2:4"]
    assert facts["replays"] == 0


def test_a_seed_repeats_what_was_sampled(swarm: Swarm) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "seed": 7, "return_token_ids": True}
    one, two = (swarm.client.complete("/v1/completions", body)["choices"][0]["token_ids"] for _ in range(2))
    assert one == two


@pytest.mark.parametrize("how", ["killed", "frozen", "stopped"])
def test_a_server_that_goes_in_mid_sentence_changes_nothing(swarm: Swarm, expected: list[int], how: str) -> None:
    swarm.complete()
    gone: list[Daemon] = []

    def strike(tokens: int) -> None:
        if gone or tokens < 10:
            return
        gone.append(swarm.busy())
        if how == "killed":
            gone[0].kill()
        elif how == "frozen":
            gone[0].freeze()
        else:
            gone[0].process.terminate()

    tokens = 600
    ids, facts = ask(swarm, tokens, strike)
    assert ids == expected[:tokens]
    assert facts["replays"] >= 1
    if how == "frozen":
        gone[0].kill()
    if how == "stopped":
        assert gone[0].process.wait(20) == 0


def test_closing_the_connection_frees_every_hop_within_a_second(swarm: Swarm) -> None:
    swarm.complete()
    body = {"prompt": PROMPT, "max_tokens": 2000, "temperature": 0, "ignore_eos": True}
    stream = swarm.client.stream("/v1/completions", body)
    next(stream)
    wait_until(lambda: swarm.sessions_served("first") == 1)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: swarm.sessions_served("first") == 0, timeout_s=1.0)
    assert swarm.sessions_served("second") + swarm.sessions_served("replica") == 0
    assert swarm.client.status()["sessions"] == []


def test_garbage_on_the_port_changes_nothing(swarm: Swarm, expected: list[int]) -> None:
    port = int(swarm.by_name["first"].join_address.split("/tcp/")[1].split("/")[0])
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 3000):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(junk)
    swarm.complete()
    assert ask(swarm, TOKENS)[0] == expected[:TOKENS]


def test_blocks_that_nobody_serves_are_named(swarm: Swarm) -> None:
    lone = start_daemon("lone", swarm.directory, "--model", "demo", "--serve-blocks", "0:4")
    swarm.daemons.append(lone)
    lone.wait_ready()
    client = Client(lone.socket_path)
    wait_until(lambda: client.status()["models"][0]["state"] == "online" if client.status()["models"] else False)
    with pytest.raises(ApiError, match="4:12") as caught:
        client.complete("/v1/completions", {"prompt": "hello", "max_tokens": 3})
    assert (caught.value.http_status, caught.value.code) == (503, "blocks-unserved")
