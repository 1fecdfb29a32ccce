"""Daemons as processes, seen from outside: what a failed start says, and that nothing outlives its block."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from peerd.loopback import Daemon, DaemonFailed, running, start_daemon, stop_all, uninterrupted


def test_a_start_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    daemon = start_daemon("bad", tmp_path, "--max-blocks", "none")
    with running([daemon]), pytest.raises(DaemonFailed, match="--max-blocks: 'none' is no whole number"):
        daemon.wait_ready()
    assert daemon.process.returncode == 2


def test_a_ready_daemon_tells_how_to_join_it_and_frozen_ones_are_stopped_too(tmp_path: Path) -> None:
    daemons: list[Daemon] = []
    with running(daemons):
        daemons.append(start_daemon("good", tmp_path, "--serve-blocks", "none"))
        daemons[0].wait_ready()
        assert daemons[0].join_address.startswith("/ip4/127.0.0.1/tcp/")
        assert daemons[0].socket_path.exists()
        daemons[0].freeze()
    assert daemons[0].process.returncode == 0
    assert not daemons[0].socket_path.exists()
    stop_all(daemons)  # once more changes nothing


def test_ctrl_c_is_held_back_and_then_heard() -> None:
    reached = False
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012 - the interrupt comes as the block ends
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGTERM) is before
