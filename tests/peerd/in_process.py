"""A whole daemon on a thread of the test's own process: what a process would be, without the seconds that its imports take."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blocks.engine.thread import DeviceThread
from overlay.ports import Ports
from overlay.transport.tcp import TcpTransport
from peerd.client import Client
from peerd.config import load
from peerd.node import Node
from peerd.store import opened_state
from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
READY_S = 60.0


@dataclass(frozen=True)
class LocalDaemon:
    """A daemon that is ready."""

    socket_path: Path
    join_address: str

    @property
    def client(self) -> Client:
        return Client(self.socket_path)


@contextlib.contextmanager
def daemon(state_dir: Path, *arguments: str) -> Iterator[LocalDaemon]:
    """Run ``peerd start ARGUMENTS`` here until the block ends, gracefully; what it died of is raised."""
    config = load(["--state-dir", str(state_dir), "--listen", LOOPBACK, "--torch-threads", "1", *arguments])
    ready = threading.Event()
    started: list[tuple[asyncio.AbstractEventLoop, Node]] = []
    failures: list[BaseException] = []

    async def live() -> None:
        with opened_state(config.paths.state_dir) as storage:
            ports = Ports(LoopClock(), SystemWallClock(), SystemRandomness(), (TcpTransport(),), storage)
            node = Node(config, ports, storage, DeviceThread(config.serving.torch_threads))
            started.append((asyncio.get_running_loop(), node))
            await node.run(lambda _: ready.set())

    def run() -> None:
        try:
            asyncio.run(live())
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="daemon")
    thread.start()
    try:
        assert ready.wait(READY_S)
        if not failures:
            yield LocalDaemon(config.paths.socket, str(started[0][1].addresses()[0]))
    finally:
        if not failures and started:
            loop, node = started[0]
            for _ in range(2):  # the second time: at once
                loop.call_soon_threadsafe(node.request_stop)
        thread.join(READY_S)
    assert not thread.is_alive()
    if failures:
        raise failures[0]
