"""Where the socket is, by the issue's rules."""

from __future__ import annotations

import pytest

from peerd.client.locate import socket_path, state_directory

HOME = {"HOME": "/home/ann"}


@pytest.mark.parametrize(
    ("environment", "state_dir", "socket", "expected"),
    [
        (HOME, None, None, "/home/ann/.local/state/peerd/run/peerd.sock"),
        (HOME | {"XDG_STATE_HOME": "/s"}, None, None, "/s/peerd/run/peerd.sock"),
        (HOME | {"XDG_STATE_HOME": "relative"}, None, None, "/home/ann/.local/state/peerd/run/peerd.sock"),
        (HOME | {"XDG_RUNTIME_DIR": "/run/user/7"}, None, None, "/run/user/7/peerd/peerd.sock"),
        (HOME | {"XDG_RUNTIME_DIR": "/run/user/7"}, "/d", None, "/d/run/peerd.sock"),
        (HOME | {"XDG_RUNTIME_DIR": "/run/user/7", "PEERD_STATE_DIR": "/d"}, None, None, "/d/run/peerd.sock"),
        (HOME | {"PEERD_SOCKET": "/p/s"}, None, None, "/p/s"),
        (HOME | {"PEERD_SOCKET": "/p/s"}, "/d", None, "/d/run/peerd.sock"),
        (HOME | {"PEERD_SOCKET": "/p/s"}, "/d", "/q/s", "/q/s"),
        (HOME, None, "~/s", "/home/ann/s"),
        (HOME, "~/d", None, "/home/ann/d/run/peerd.sock"),
        ({}, None, None, "/.local/state/peerd/run/peerd.sock"),
    ],
)
def test_the_socket_is_found(
    environment: dict[str, str], state_dir: str | None, socket: str | None, expected: str
) -> None:
    assert socket_path(environment, state_dir, socket) == expected


def test_a_given_state_directory_goes_before_the_environment() -> None:
    assert state_directory(HOME | {"PEERD_STATE_DIR": "/e"}, "/d") == "/d"
    assert state_directory(HOME | {"PEERD_STATE_DIR": "/e"}) == "/e"
