"""Daemons end when they are told to, whatever they are at, and never outlive the program that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from peerd.client import ApiError, ClientError
from peerd.loopback import STOP_TIMEOUT_S, running, start_daemon
from peerd.store import StateInUse, opened_state
from tests.e2e.processes import Network, wait_until

STARTER = """
import sys
from pathlib import Path
from peerd.loopback import start_daemon

daemon = start_daemon("daemon", Path(sys.argv[1]), *sys.argv[2:])
daemon.wait_ready()
print("started", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.timeout(180)


def has_ended(state_dir: Path) -> bool:
    """Whether no process holds the state directory: its lock dies with the process."""
    try:
        with opened_state(state_dir):
            return True
    except StateInUse:
        return False


def test_daemons_end_when_the_program_that_started_them_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(tmp_path), "--serve-blocks", "none"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"started\n"
        assert not has_ended(tmp_path / "daemon")
        starter.kill()
    wait_until(lambda: has_ended(tmp_path / "daemon"), STOP_TIMEOUT_S)
    assert not (tmp_path / "daemon" / "run" / "peerd.sock").exists()  # it stopped in good order


def test_a_daemon_whose_loader_waits_for_a_silent_hub_ends_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        daemon = start_daemon("daemon", tmp_path, "--model", "owner/model")
        with running([daemon]):
            daemon.wait_ready()
            asked, _ = silent.accept()
            with asked:
                os.kill(daemon.process.pid, signal.SIGTERM)
                assert daemon.process.wait(STOP_TIMEOUT_S) == 0


def test_a_daemon_in_the_middle_of_an_answer_ends_when_asked(tmp_path: Path) -> None:
    made = Network(tmp_path)
    with running(made.daemons):
        daemon = made.start("client", "--model", "demo")
        body = {"model": "demo", "prompt": "Tell me", "max_tokens": 1000, "ignore_eos": True}
        stream = made.client().stream("/v1/completions", body)
        next(stream)
        daemon.process.terminate()
        assert daemon.process.wait(STOP_TIMEOUT_S) == 0
        with pytest.raises((ApiError, ClientError)):
            list(stream)
        made.check_logs()
