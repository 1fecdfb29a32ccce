"""What a daemon costs when nothing happens: start time, idle CPU, resident memory; and `peerctl`'s own memory and start.

Figures of whole processes, read from the operating system.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.swarm_steps import swarm_loop, wait_online
from peerd.client import Client, ClientError
from peerd.loopback import running, start_daemon

IDLE_S = 10.0


LAUNCHER = """
import os, sys, time
started = time.perf_counter()
quiet = os.open(os.devnull, os.O_WRONLY)
actions = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
_, _, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions), 0)
print(time.perf_counter() - started, usage.ru_maxrss / 1024)
"""
"""A small parent: Linux counts what a process was before `exec` into its peak, and this one imports torch."""


def measured_child(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float]:
    """(wall seconds, peak MB) of one command, by wait4."""
    launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, *command]
    wall, peak = subprocess.run(launcher, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return float(wall), float(peak)


def socket_answers_after(socket: Path, started: float) -> float:
    """Seconds from ``started`` until the daemon's socket answers a status call."""
    while True:
        try:
            Client(socket).status()
        except (ClientError, OSError):
            time.sleep(0.005)
        else:
            return time.monotonic() - started


def imports_take() -> float:
    """Seconds that a fresh interpreter needs for the imports of a serving daemon."""
    wall, _ = measured_child([sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama"])
    return wall


def main() -> None:
    """Print the table."""
    bin_dir = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(prefix="peerd-bench-") as work, running([]) as daemons:
        started = time.monotonic()
        daemons.append(start_daemon("server", Path(work), "--model", "demo", "--serve-blocks", "auto"))
        server = daemons[0]
        socket_s = socket_answers_after(server.socket_path, started)
        wait_online(server.socket_path, 12)
        online_s = time.monotonic() - started
        server.wait_ready()
        daemons.append(start_daemon("client", Path(work), "--serve-blocks", "none", "--join", server.join_address))
        client = daemons[1]
        client.wait_ready()
        wait_online(client.socket_path, 12)
        swarm_loop(client.socket_path)()
        processes = [psutil.Process(daemon.process.pid) for daemon in daemons]
        before = [sum(process.cpu_times()[:2]) for process in processes]
        time.sleep(IDLE_S)
        idle = [
            100 * (sum(process.cpu_times()[:2]) - cpu) / IDLE_S for process, cpu in zip(processes, before, strict=True)
        ]
        rss = [process.memory_info().rss / 2**20 for process in processes]
        peerctl = [str(bin_dir / "peerctl")]
        environment = os.environ | {"PEERD_SOCKET": str(client.socket_path)}
        _, status_mb = measured_child([*peerctl, "status"], environment)
        _, generate_mb = measured_child([*peerctl, "generate", "Hello", "--max-tokens", "8"], environment)
        help_s, help_mb = min(measured_child([*peerctl, "--help"]) for _ in range(5))
        start_help_s, _ = min(measured_child([str(bin_dir / "peerd"), "--help"]) for _ in range(5))
    print("\nfootprint (demo model)")
    print(
        f"  socket answers after {socket_s:.2f} s, online after {online_s:.2f} s; imports alone take {imports_take():.2f} s"
    )
    for name, cpu, memory in zip(("serving daemon", "client-only daemon"), idle, rss, strict=True):
        print(f"  {name:<20} idle {cpu:5.2f} % of a core over {IDLE_S:.0f} s, RSS {memory:6.1f} MB")
    print(
        f"  peerctl --help       {help_s * 1000:5.0f} ms, peak {help_mb:5.1f} MB; peerd --help {start_help_s * 1000:5.0f} ms"
    )
    print(f"  peerctl status       peak {status_mb:5.1f} MB; peerctl generate peak {generate_mb:5.1f} MB")


if __name__ == "__main__":
    main()
