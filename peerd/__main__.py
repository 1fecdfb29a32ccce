"""``python -m peerd``: the daemon's process. `start`, `id` and `demo`; `peerd` (the command) execs this.

Owns signals, logging and exit codes; everything else is `peerd.node`. A PeerdError ends it with its sentence and its exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from overlay.errors import PeerdError
from peerd.config import STOP_WITH_STDIN, Config, ConfigError, load, state_directory

if TYPE_CHECKING:  # imported where they are used, so that `peerd id` stays light
    from overlay.ports import Ports
    from peerd.node import Node
    from peerd.store import FileStorage

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Each ends the daemon in good order: Ctrl-C, `kill`, and a terminal that is closed."""
IGNORED_BYTES = 4096
"""What is read at a time of a standard input that only counts by its end."""
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
    for chatty in ("kademlia", "asyncio", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
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
    if config.stop_with_stdin:
        _stop_with_stdin(loop, node)
    await node.run(_say_ready)


def _stop_with_stdin(loop: asyncio.AbstractEventLoop, node: Node) -> None:
    """Stop when the other end of standard input is gone, however its holder ended: nobody is left to wait for a drain."""
    stdin = sys.__stdin__.fileno() if sys.__stdin__ is not None else -1

    def readable() -> None:
        if os.read(stdin, IGNORED_BYTES):
            return
        loop.remove_reader(stdin)
        node.request_stop()
        node.request_stop()

    try:
        loop.add_reader(stdin, readable)
    except (OSError, ValueError) as error:  # a file, or closed
        raise ConfigError(f"{STOP_WITH_STDIN}: standard input has to be a pipe, a socket or a terminal.") from error


def _end(code: int) -> NoReturn:
    """End the process, without waiting for threads that load, hash or import: what they make is of no use now."""
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # closed or full outputs: there is nobody to tell
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _say_ready(node: Node) -> None:
    gc.freeze()  # what was imported and loaded stays: looking through it for garbage takes an eighth of a second each time
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
    status = main()
    if threading.active_count() > 1:
        _end(status)
    sys.exit(status)
