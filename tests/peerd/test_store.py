"""The state directory: what is kept, whom it belongs to, and what a damaged file counts as."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from peerd.store import (
    KNOWN_PEERS_AT_MOST,
    FileStorage,
    StateError,
    StateInUse,
    load_known_peers,
    load_port,
    next_incarnation,
    opened_state,
    save_known_peers,
    save_port,
    state_files,
)


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path)


def test_what_is_saved_is_there_and_only_ours(storage: FileStorage, tmp_path: Path) -> None:
    assert storage.load("identity") is None
    storage.save("identity", b"one")
    storage.save("identity", b"two")
    assert storage.load("identity") == b"two"
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]


@pytest.mark.parametrize("name", ["", "../identity", ".hidden", "a/b", "UPPER", "a b"])
def test_a_name_that_leaves_the_directory_is_our_own_error(storage: FileStorage, name: str) -> None:
    with pytest.raises(ValueError, match="state file"):
        storage.save(name, b"")


def test_a_file_that_can_t_be_read_or_written_is_told(storage: FileStorage, tmp_path: Path) -> None:
    (tmp_path / "port").mkdir()
    with pytest.raises(StateError, match=r"Can't read .*port"):
        storage.load("port")
    with pytest.raises(StateError, match=r"Can't write .*port"):
        storage.save("port", b"1")


def test_a_file_that_others_may_read_is_closed_to_them(storage: FileStorage, tmp_path: Path) -> None:
    storage.save("identity", b"one")
    (tmp_path / "identity").chmod(0o644)
    assert storage.load("identity") == b"one"
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o600


def test_a_directory_is_one_daemon_s_and_free_when_it_ends(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    with opened_state(directory):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        with pytest.raises(StateInUse, match="peerd stop"), opened_state(directory):
            pass
    with opened_state(directory):
        pass


def test_a_state_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StateError, match="--state-dir"), opened_state(tmp_path / "state"):
        pass


def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StateError, match="belongs to another user"):
        state_files(tmp_path)


def test_incarnations_rise_and_are_on_disk_before_they_are_used(storage: FileStorage) -> None:
    assert [next_incarnation(storage) for _ in range(3)] == [1, 2, 3]
    assert storage.load("incarnation") == b"3"


@pytest.mark.parametrize("port", [b"", b"zebra", b"0", b"65536", b"999999", b"-1"])
def test_a_damaged_port_is_chosen_anew(storage: FileStorage, port: bytes) -> None:
    storage.save("port", port)
    assert load_port(storage) == 0


def test_a_port_is_kept(storage: FileStorage) -> None:
    assert load_port(storage) == 0
    save_port(storage, 4001)
    assert load_port(storage) == 4001


def test_known_peers_are_kept_up_to_a_bound(storage: FileStorage) -> None:
    assert load_known_peers(storage) == ()
    names = [f"/ip4/203.0.113.7/tcp/{port}" for port in range(1, 200)]
    save_known_peers(storage, names)
    assert load_known_peers(storage) == tuple(names[:KNOWN_PEERS_AT_MOST])


@pytest.mark.parametrize("data", [b"", b"\xff", b"{}", b"[1, null]", b"[" * 100_000])
def test_damaged_known_peers_are_none(storage: FileStorage, data: bytes) -> None:
    storage.save("known-peers.json", data)
    assert load_known_peers(storage) == ()


def test_known_peers_that_are_no_addresses_are_left_out(storage: FileStorage) -> None:
    good = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    save_known_peers(storage, ["nonsense", good, "/ip4/203.0.113.7/tcp/1/p2p/Qm", "/ip4/203.0.113.7"])
    assert load_known_peers(storage) == (good,)
