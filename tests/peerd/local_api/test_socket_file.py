"""The socket's file: private, replaced when stale, refused when live."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from overlay.errors import PeerdError
from peerd.client import Client
from peerd.local_api.errors import SocketDirectoryError, SocketInUse, SocketPathError
from peerd.local_api.socket_file import check_socket_path, listening_socket, peer_uid
from tests.peerd.scripted import ScriptedNode, answering


def test_the_socket_and_its_directory_are_only_ours(tmp_path: Path) -> None:
    path = tmp_path / "run" / "peerd.sock"
    with listening_socket(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_live_daemon_is_not_replaced(tmp_path: Path) -> None:
    with answering(ScriptedNode(), tmp_path / "run" / "s") as path:
        with pytest.raises(SocketInUse, match=r"already answers at .*`peerd stop`") as caught, listening_socket(path):
            pass
        assert caught.value.exit_code == 17
        assert Client(path).status()["state"] == "online"


def test_a_live_stranger_is_not_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "s"))
        stranger.listen()
        with pytest.raises(SocketInUse), listening_socket(tmp_path / "s"):
            pass
    assert (tmp_path / "s").exists()


def test_what_a_dead_daemon_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()
    with answering(ScriptedNode(), path):
        assert Client(path).status()["state"] == "online"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(SocketPathError, match="no socket"), listening_socket(path):
        pass
    assert path.read_text() == "precious"


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(SocketDirectoryError, match="chmod 700"), listening_socket(tmp_path / "open" / "s"):
        pass


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PeerdError, match="choose another"), listening_socket(tmp_path / "file" / "s"):
        pass
    with pytest.raises(SocketDirectoryError), listening_socket(tmp_path / "file" / "deeper" / "s"):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(SocketDirectoryError, match="another user"), listening_socket(tmp_path / "theirs" / "s"):
        pass


def test_a_path_over_the_limit_of_the_system_is_told(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match=r"has \d+ bytes and this system allows \d+; give a shorter one"):
        check_socket_path(f"/{'x' * 120}")
    limit = 107 - len(str(tmp_path)) - 1
    with listening_socket(tmp_path / ("y" * limit)):  # the longest there may be
        pass


def test_the_other_end_is_known_by_its_user() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.getuid()
