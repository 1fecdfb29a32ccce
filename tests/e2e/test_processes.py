"""Real daemons as processes on loopback: the same text whatever is killed, frozen or stopped, and nothing left behind.

Starting daemons is what costs, so one swarm serves the whole module; a test that ends a server starts another in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks.model.exact import Reference
from peerd.client import ApiError
from peerd.loopback import Daemon, running, start_daemon
from tests.e2e.processes import Network, greedy, peer_of, wait_until
from tests.models import make_tiny

BLOCKS = 4
PROMPT = [5, 6, 7, 8, 9]
TOKENS = 40
SPANS = {"first": "0:2", "second": "2:4", "replica": "2:4"}

pytestmark = pytest.mark.timeout(240)


class Swarm(Network):
    """Three servers of a directory model, and a client that has none of its files."""

    def __init__(self, directory: Path, model: Path) -> None:
        super().__init__(directory)
        self.model = model

    def serve(self, name: str) -> None:
        self.start(name, "--model", str(self.model), "--serve-blocks", SPANS[name])

    def complete(self) -> None:
        """Replace what a test ended, and wait until all is online, the second half twice."""
        for name in SPANS:
            if name not in self.by_name or self.by_name[name].process.poll() is not None:
                self.serve(name)
        wait_until(lambda: self.replicas(self.model.name, BLOCKS) == [1, 1, 2, 2])

    def busy(self) -> Daemon:
        """A server of the second half that the client's only session uses."""
        found: list[Daemon] = []

        def look() -> bool:
            sessions = self.client().status()["sessions"]
            used = {hop["peer"] for session in sessions for hop in session["route"]}
            found[:] = [self.by_name[name] for name in ("second", "replica") if peer_of(self.by_name[name]) in used]
            return bool(found)

        wait_until(look)
        return found[0]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    directory = tmp_path_factory.mktemp("e2e")
    model = make_tiny("llama", directory / "little", num_hidden_layers=BLOCKS, max_position_embeddings=2048)
    made = Swarm(directory, model)
    with running(made.daemons):
        for name in SPANS:
            made.serve(name)
        made.start("client", "--serve-blocks", "none")
        made.complete()
        yield made
        made.check_logs()


@pytest.fixture(scope="module")
def expected(swarm: Swarm) -> list[int]:
    return Reference.load(str(swarm.model)).greedy(PROMPT, 1000)


def ask(swarm: Swarm, tokens: int, on_token: Callable[[int], None] | None = None) -> tuple[list[int], dict[str, Any]]:
    body = {"model": swarm.model.name, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
    return greedy(swarm.client(), body, on_token)


def test_a_client_without_files_gets_the_tokens_of_local_transformers(swarm: Swarm, expected: list[int]) -> None:
    ids, facts = ask(swarm, TOKENS)
    assert ids == expected[:TOKENS]
    assert facts["route"][0]["peer"] == peer_of(swarm.by_name["first"])
    assert facts["replays"] == 0


def test_a_seed_repeats_what_was_sampled(swarm: Swarm) -> None:
    body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "return_token_ids": True}
    one, two, other = (
        swarm.client().complete("/v1/completions", {**body, "seed": seed})["choices"][0]["token_ids"]
        for seed in (7, 7, 8)
    )
    assert one == two
    assert one != other


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
    stream = swarm.client().stream("/v1/completions", body)
    next(stream)
    wait_until(lambda: swarm.gauge("first", "sessions_served") == 1)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: all(swarm.gauge(name, "sessions_served") == 0 for name in SPANS), timeout_s=1.0)
    assert swarm.client().status()["sessions"] == []


def test_blocks_that_nobody_serves_are_named(swarm: Swarm) -> None:
    lone = start_daemon("lone", swarm.directory, "--model", "demo", "--serve-blocks", "0:4")
    swarm.add(lone)
    wait_until(lambda: [model["state"] for model in swarm.client("lone").status()["models"]] == ["online"])
    with pytest.raises(ApiError, match="4:12") as caught:
        swarm.client("lone").complete("/v1/completions", {"prompt": "hello", "max_tokens": 3})
    assert (caught.value.http_status, caught.value.code) == (503, "blocks-unserved")
