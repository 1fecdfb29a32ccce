"""The card's two commands on one machine, verbatim: a real daemon, a real model, a real answer; and how starts go wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
START_TIMEOUT_S = 60


def environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEERD_", "XDG_"))}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1", "PEERD_LISTEN": LOOPBACK}


def run(home: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment(home) | extra, timeout=START_TIMEOUT_S
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("h")


@pytest.fixture(scope="module")
def daemon(home: Path) -> Iterator[subprocess.Popen[str]]:
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            ["peerd", "start", "--serve-blocks", "auto"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(home),
        )
    assert process.stdout is not None
    try:
        with process.stdout:
            line = process.stdout.readline()
            assert "ready" in line and "--join /ip4/127.0.0.1/tcp/" in line, (line, (home / "log").read_text())
            yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def test_the_two_commands_of_the_card_work(home: Path, daemon: subprocess.Popen[str]) -> None:
    done = run(home, "peerctl", "generate", "Tell me a story about a fox.")
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout
    assert done.stdout.endswith(".\n")
    status = json.loads(run(home, "peerctl", "status", "--json").stdout)
    assert all(address.endswith(f"/p2p/{status['peer_id']}") for address in status["addresses"])
    assert [(model["name"], model["span"], model["state"]) for model in status["models"]] == [
        ("demo", "0:12", "online")
    ]
    assert run(home, "peerd", "id").stdout == status["peer_id"] + "\n"
    swarm = json.loads(run(home, "peerctl", "swarm", "--json").stdout)
    assert swarm["models"][0]["unserved"] == []


def test_the_same_prompt_gives_the_same_text_whole_and_streamed(home: Path, daemon: subprocess.Popen[str]) -> None:
    streamed = run(home, "peerctl", "generate", "What do bees make?").stdout
    whole = json.loads(run(home, "peerctl", "generate", "What do bees make?", "--json").stdout)
    assert whole["choices"][0]["message"]["content"] + "\n" == streamed
    assert whole["peerd"]["route"][0]["span"] == "0:12"


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 13, "peerd stop"),
        (["--state-dir", "{home}/other", "--socket", "{socket}"], 17, "already answers"),
    ],
)
def test_a_second_daemon_in_the_same_place_is_refused(
    home: Path, daemon: subprocess.Popen[str], flags: list[str], code: int, words: str
) -> None:
    places = {"home": str(home), "socket": str(home / ".local/state/peerd/run/peerd.sock")}
    done = run(home, "peerd", "start", *(flag.format(**places) for flag in flags))
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert run(home, "peerctl", "status").returncode == 0


def test_a_port_in_use_is_a_sentence_and_a_code(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "peerd", "start", "--serve-blocks", "none", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert done.returncode == 10
    assert "another program uses it" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_a_sentence_and_a_code(tmp_path: Path) -> None:
    done = run(tmp_path, "peerd", "start", "--device", "cuda:99")
    assert done.returncode == 15
    assert "--device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_wrong_model_directory_is_a_sentence_and_a_code(tmp_path: Path) -> None:
    done = run(tmp_path, "peerd", "start", "--model", f"{tmp_path}/nothing", "--serve-blocks", "auto")
    assert done.returncode == 40
    assert "is not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_identity_that_can_t_be_kept_is_a_sentence_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for state_dir in ("file", "file/below"):
        done = run(tmp_path, "peerd", "id", "--state-dir", f"{tmp_path}/{state_dir}")
        assert (done.returncode, done.stdout) == (12, "")
        assert "give another with --state-dir" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_terminal_that_is_closed_ends_the_daemon_in_good_order(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["peerd", "start", "--serve-blocks", "none", "--state-dir", str(tmp_path / "s")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(tmp_path),
    )  # fmt: skip
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, errors) == (0, "")
    assert not (tmp_path / "s" / "run" / "peerd.sock").exists()


def test_stop_ends_the_daemon_in_good_order(home: Path, daemon: subprocess.Popen[str]) -> None:
    done = run(home, "peerd", "stop")
    assert (done.returncode, done.stdout) == (0, f"stopped (pid {daemon.pid})\n")
    assert daemon.wait(5) == 0
    assert "Traceback" not in (home / "log").read_text()
    assert run(home, "peerctl", "status").returncode == 3
