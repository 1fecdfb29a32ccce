"""`peerd demo` where it doesn't end well: interrupted, it leaves nothing; and what it counts as complete, and as the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from peerd.demo import EXIT_INTERRUPTED, _until_end, replicas_online


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets' paths are short enough for any system."""
    with tempfile.TemporaryDirectory(prefix="pd-", dir="/tmp") as directory:
        yield Path(directory)


def test_ctrl_c_leaves_no_process_and_no_directory(short_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(short_path)}
    # One server is enough to interrupt, and costs a third.
    script = "import sys, peerd.demo as demo; demo.SPANS = demo.SPANS[:1]; sys.exit(demo.main())"
    printed: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            printed.append(line.decode())
            if b"waiting until every block" in line:
                break
        assert demo.poll() is None, "".join(printed)
        started = psutil.Process(demo.pid).children()
        assert len(started) == 3, "a server, the client and the reference"
        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read().decode()
        assert demo.wait(60) == EXIT_INTERRUPTED
    assert rest.endswith("\ninterrupted; stopping the daemons\nthe daemons are stopped\n")
    assert "Traceback" not in rest
    assert [process for process in started if process.is_running()] == []
    assert list(short_path.iterdir()) == []


def test_the_swarm_is_complete_when_the_middle_is_online_twice() -> None:
    spans = [("0:4", "online"), ("4:8", "online"), ("4:8", "joining"), ("8:12", "online")]
    servers = [{"span": span, "state": state} for span, state in spans]
    models = [{"name": "other", "blocks": 2, "servers": []}, {"name": "demo", "blocks": 12, "servers": servers}]
    assert replicas_online({"models": models}) == [1] * 12
    servers[2]["state"] = "online"
    assert replicas_online({"models": models}) == [1] * 4 + [2] * 4 + [1] * 4
    assert replicas_online({}) == []


def test_the_reference_ends_where_a_client_s_answer_does() -> None:
    assert _until_end([5, 6, 2, 7], {2, 3}) == [5, 6, 2]
    assert _until_end([5, 6, 7], {2, 3}) == [5, 6, 7]
