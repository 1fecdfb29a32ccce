"""``python -m peerd``: the daemon's process. `start`, `id` and `demo`; `peerd` (the command) execs this.

Owns signals, logging and exit codes; everything else is `peerd.node`. A PeerdError ends it with its sentence and its exit code.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overlay.errors import PeerdError
from peerd.config import Config, load, state_directory

if TYPE_CHECKING:  # imported where they are used, so that `peerd id` stays light
    from overlay.ports import Ports
    from peerd.node import Node
    from peerd.store import FileStorage

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each ends the daemon in good order: Ctrl-C, `kill`, and a terminal that is closed."""
LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (words[0], words[1:]) if words else ("start", [])
    try:
        if command == "start":
            return _start(load(rest))
        if command == "id":
            return _id(rest)
        if command == "demo":
            from peerd.demo import main as demo

            return demo()
    except PeerdError as error:
        print(f"peerd: {error}", file=sys.stderr)
        return error.exit_code
    print(f"peerd: there is no command {command!r}; use start, id or demo.", file=sys.stderr)
    return 2


def _start(config: Config) -> int:
    from overlay.ports import Ports
    from overlay.transport.tcp import TcpTransport
    from peerd.first_look import check_models
    from peerd.store import opened_state
    from peerd.system_ports import LoopClock, SystemRandomness, SystemWallClock

    check_models(config.serving)
    logging.basicConfig(level=config.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    logging.getLogger("kademlia").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    with opened_state(config.paths.state_dir) as storage:
        ports = Ports(LoopClock(), SystemWallClock(), SystemRandomness(), (TcpTransport(),), storage)
        try:
            asyncio.run(_run(config, ports, storage))
        except KeyboardInterrupt:
            return 130
    return 0


async def _run(config: Config, ports: Ports, storage: FileStorage) -> None:
    from blocks.engine.thread import DeviceThread
    from peerd.node import Node

    node = Node(config, ports, storage, DeviceThread(config.serving.torch_threads))
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue  # nohup's daemon outlives its terminal
        loop.add_signal_handler(number, node.request_stop)
    await node.run(_say_ready)


def _say_ready(node: Node) -> None:
    address = node.addresses()[0]
    print(f"ready: peerd start --join {address}", flush=True)


def _id(rest: Sequence[str]) -> int:
    import argparse

    from overlay.identity import Identity
    from peerd.store import state_files
    from peerd.system_ports import SystemRandomness

    parser = argparse.ArgumentParser(prog="peerd id", description="Print this machine's peer id.")
    parser.add_argument("--state-dir", metavar="DIR", help="where the identity is kept")
    storage = state_files(state_directory(parser.parse_args(rest).state_dir))
    print(Identity.load_or_create(storage, SystemRandomness()).peer_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
