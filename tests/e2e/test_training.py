"""Training jobs on real daemons: killed, served by others, and the same to the last bit.

One swarm serves the module, since starting daemons is what costs: three servers, which the tests lose one by one, and a client that trains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blocks.demo_training.greetings import jsonl
from peerd.client.jobs import create_job, get_job, watch_job
from peerd.loopback import Daemon, start_daemon, stop_all
from tests.e2e.processes import Network, wait_until

SETTINGS = {
    "length": 4,
    "epochs": 1,
    "batch": 4,
    "micro_batch": 64,
    "warmup": 2,
    "eval_split": 0.2,
    "checkpoint_every": 4,
}
DATASET = jsonl(1, 60).encode()
STEPS = 12
KILL_AT = 6
CLIENT_DIRECTORY = "training"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("training"))
    try:
        made.start("server", "--model", "demo", "--serve-blocks", "0:12")
        join = ("--join", made.daemons[0].join_address)
        others = [
            start_daemon(name, made.directory / name, "--model", "demo", "--serve-blocks", span, *join)
            for name, span in (("left", "0:7"), ("right", "5:12"))
        ]
        made.daemons += others
        start_client(made)
        for daemon in others:
            made.by_name[daemon.name] = daemon
            daemon.wait_ready()
        wait_until(lambda: min(made.replicas("demo", 12)) == 2)
        yield made
    finally:
        stop_all(made.daemons)
    made.check_logs()


def start_client(network: Network) -> None:
    """The client, each time in the same state directory."""
    join = ("--join", network.daemons[0].join_address)
    directory = network.directory / CLIENT_DIRECTORY
    network.add(start_daemon("client", directory, "--serve-blocks", "none", *join))


def train(
    network: Network, name: str, at_step: Callable[[dict[str, Any]], None] = lambda job: None, **more: Any
) -> dict[str, Any]:
    """Train to the end; ``at_step`` sees every event."""
    create_job(network.client(), {"name": name, "seed": 3, **SETTINGS, **more}, DATASET)
    job: dict[str, Any] = {}
    for job in watch_job(network.client(), name):
        at_step(job)
    assert (job["state"], job["progress"]["step"]) == ("done", STEPS), job["reason"]
    return job


def losses(network: Network, name: str) -> list[float]:
    path = network.by_name["client"].state_dir / "jobs" / name / "losses.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def calm(network: Network) -> list[float]:
    """The losses of a run that nothing disturbs."""
    job = train(network, "calm")
    assert job["progress"]["server_losses"] == 0
    found = losses(network, "calm")
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.05
    return found


def test_another_seed_gives_another_curve(network: Network, calm: list[float]) -> None:
    train(network, "other", seed=4)
    assert max(abs(one - other) for one, other in zip(calm, losses(network, "other"), strict=True)) > 1e-2


def test_a_job_goes_on_after_kill_9_of_its_daemon_as_if_nothing_had_been(network: Network, calm: list[float]) -> None:
    create_job(network.client(), {"name": "killed", "seed": 3, **SETTINGS}, DATASET)
    for job in watch_job(network.client(), "killed"):
        if job["progress"]["step"] >= KILL_AT:
            network.by_name["client"].kill()
            break
    killed_at = job["progress"]["step"]
    start_client(network)
    ended = list(watch_job(network.client(), "killed"))[-1]
    assert ended["state"] == "done", ended["reason"]
    resumed = re.search(r"job killed goes on after step (\d+)", network.by_name["client"].log_path.read_text())
    assert resumed is not None
    assert 0 < int(resumed.group(1)) <= killed_at < STEPS
    assert ended["progress"]["eval_before"] is not None
    assert max(abs(one - other) for one, other in zip(calm, losses(network, "killed"), strict=True)) < 1e-4


def test_fewer_servers_and_the_loss_of_one_change_no_bit(network: Network, calm: list[float]) -> None:
    def kill_one(job: dict[str, Any]) -> None:
        if job["progress"]["step"] >= KILL_AT and network.by_name["server"].process.poll() is None:
            network.by_name["server"].kill()

    train(network, "spread", kill_one)
    assert network.by_name["server"].process.poll() is not None
    assert losses(network, "spread") == calm


def test_a_job_waits_for_blocks_that_are_gone_and_goes_on_when_they_are_back(
    network: Network, calm: list[float]
) -> None:
    def lose_some(job: dict[str, Any]) -> None:
        states.append(job["state"])
        if job["progress"]["step"] >= 2 and network.by_name["left"].process.poll() is None:
            network.by_name["left"].kill()
        if job["state"] == "waiting" and not again:
            join = ("--join", network.by_name["client"].join_address)
            again.append(start_daemon("again", network.directory, "--model", "demo", "--serve-blocks", "0:5", *join))
            network.add(again[0])

    states: list[str] = []
    again: list[Daemon] = []
    train(network, "waited", lose_some)
    assert "waiting" in states
    assert losses(network, "waited") == calm
    assert get_job(network.client(), "waited")["state"] == "done"
