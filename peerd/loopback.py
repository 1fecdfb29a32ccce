"""A swarm of real daemons as processes on loopback: for `peerd demo`, end-to-end tests and benchmarks.

Owns the processes that it started (and only those), their state directories and their logs. Knows a daemon only from
outside: its command line, its `ready` line, its socket. Each daemon's standard input is a pipe whose other end is held here and
nowhere else, so that daemons stop when this process is gone, even killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peerd.config import STOP_WITH_STDIN

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
READY_LINE_BYTES = 8192


class DaemonFailed(RuntimeError):
    """A daemon ended, or said nothing, before it was ready; holds the end of its log."""


@dataclass(slots=True)
class Daemon:
    """One `peerd start` in the foreground of its own process group."""

    name: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    join_line: str = ""
    ready_after_s: float = 0.0
    _output: bytearray = field(default_factory=bytearray, repr=False)

    @property
    def socket_path(self) -> Path:
        return self.state_dir / "run" / "peerd.sock"

    @property
    def log_path(self) -> Path:
        return self.state_dir / "log"

    @property
    def join_address(self) -> str:
        """The multiaddr that other daemons give to ``--join``."""
        return self.join_line.split("--join", 1)[1].split()[0]

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the daemon wrote to its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Read standard output until the line that joins this daemon. Raises DaemonFailed."""
        started = time.monotonic()
        deadline = started + timeout_s
        stdout = self.process.stdout
        assert stdout is not None
        while True:
            for line in bytes(self._output).decode(errors="replace").splitlines():
                if "--join" in line:
                    self.join_line = line.strip()
                    self.ready_after_s = time.monotonic() - started
                    return
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(stdout.fileno(), READY_LINE_BYTES) if readable else b""
            if not chunk:
                why = f"was not ready within {timeout_s:.0f} s" if not readable else "ended before it was ready"
                raise DaemonFailed(f"{self.name} {why}.\n{self.log_tail()}")
            self._output += chunk

    def kill(self) -> None:
        """End it as a power cut would (SIGKILL), and reap it."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it as Ctrl-C would; kill it when it takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def start_daemon(
    name: str, directory: Path, *arguments: str, torch_threads: int = 1, listen: str | None = LOOPBACK
) -> Daemon:
    """Start ``peerd start ARGUMENTS`` with its own state directory below ``directory``; returns before it is ready.

    It listens on loopback only, on a port that the kernel picks, unless ``--listen`` is among the arguments; with ``listen`` None,
    where daemons listen by themselves. Its standard error is appended to `Daemon.log_path`, and what libraries leave in the
    temporary directory goes into its state directory.
    """
    state_dir = directory / name
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    where = () if listen is None or "--listen" in arguments else ("--listen", listen)
    start = [sys.executable, "-m", "peerd", "start", STOP_WITH_STDIN]
    command = [*start, "--state-dir", str(state_dir), *where, *arguments]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PEERD_")}
    environment = kept | {"OMP_NUM_THREADS": str(torch_threads), "PYTHONUNBUFFERED": "1", "TMPDIR": str(state_dir)}
    with (state_dir / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    return Daemon(name, state_dir, process)


@contextlib.contextmanager
def running(daemons: list[Daemon]) -> Iterator[list[Daemon]]:
    """Stop every daemon in the list at the end, also those added meanwhile, however the block ends."""
    try:
        yield daemons
    finally:
        with uninterrupted():
            stop_all(daemons)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and its like back until the block has ended, so that no process is started and forgotten, or left half stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda got, _: held.append(got)) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def stop_all(daemons: Sequence[Daemon]) -> None:
    """Ask all to stop at once, then wait for each."""
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)
            daemon.process.terminate()
    for daemon in daemons:
        daemon.stop()
