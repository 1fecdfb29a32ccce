"""Sessions of hidden states over the real socket: what is refused, and what reaches a session; only the session is a script.

The numbers that real servers answer are in tests/peerd/test_hidden_sessions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from overlay.errors import PeerdError
from overlay.rpc.types import Part
from peerd.client import ApiError, Client
from peerd.client.client import TENSORS_TYPE
from peerd.client.tensor_body import Tensor, encode
from peerd.decoding import DriverModel
from peerd.driving import RouteWish
from peerd.hidden_sessions import HiddenSessions, SessionConflict, SessionsFull, UnknownSession
from peerd.local_api import tensor_requests
from peerd.local_api.node_view import BlockModel
from routing.types import ComputeClass, ModelId, Span
from tests.peerd.scripted import ScriptedNode, Unserved, answering

WIDTH, BLOCKS, CONTEXT = 4, 6, 32
PATH = "/api/v0/sessions"


class HalvingSession:
    """`HiddenSession` whose blocks halve."""

    def __init__(self, model: DriverModel, max_tokens: int) -> None:
        self.session = bytes(15) + b"\x01"
        self.model, self.max_tokens = model, max_tokens
        self.asked: list[tuple[tuple[int, ...], int, str]] = []
        self.error: PeerdError | None = None
        self.closed = False

    async def step(self, hidden: Part, position: int, want: str) -> list[Part]:
        self.asked.append((hidden.shape, position, want))
        if self.error is not None:
            raise self.error
        values = np.frombuffer(hidden.data, np.float32).reshape(hidden.shape) / 2
        return [Part("hidden", "float32", row.shape, row.tobytes()) for row in np.split(values, len(values))]

    def close(self, error: PeerdError | None = None) -> None:
        self.closed = True


class OneSession(HiddenSessions):
    """Knows the session that was opened last."""

    only: HalvingSession | None = None

    def get(self, name: str) -> Any:
        if self.only is None or self.only.closed or name != self.only.session.hex():
            raise UnknownSession("There is no such session.")
        return self.only


class SessionNode(ScriptedNode):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.hidden_sessions: OneSession = OneSession()
        self.opened: list[RouteWish] = []
        self.full = False

    async def block_model(self, name: str | None) -> BlockModel:
        model = await self.open_model(name)
        driver = DriverModel("key", ModelId(bytes(32)), ComputeClass("none", "float32"), WIDTH, CONTEXT)
        return BlockModel(model.name, BLOCKS, '{"model_type": "llama"}', driver)

    def open_session(self, wish: RouteWish) -> HalvingSession:
        if self.full:
            raise SessionsFull("256 sessions are open.")
        self.opened.append(wish)
        self.hidden_sessions.only = HalvingSession(wish.model, wish.max_tokens)
        return self.hidden_sessions.only

    @property
    def session(self) -> HalvingSession:
        assert self.hidden_sessions.only is not None
        return self.hidden_sessions.only


@pytest.fixture
def node() -> SessionNode:
    return SessionNode()


@pytest.fixture
def client(node: SessionNode, tmp_path: Path) -> Iterator[Client]:
    with answering(node, tmp_path / "run" / "peerd.sock") as path:
        yield Client(path)


def f32(values: Any) -> Tensor:
    array = np.asarray(values, np.float32)
    return Tensor("F32", array.shape, array.tobytes())


def opened(client: Client, **settings: Any) -> str:
    document = client.call("POST", PATH, {"max_tokens": 16, **settings}, 10)
    return f"{PATH}/{document['id']}/step"


STATES = np.arange(3 * WIDTH, dtype=np.float32).reshape(1, 3, WIDTH)


def test_states_go_in_and_come_out(client: Client, node: SessionNode) -> None:
    step = opened(client, model="demo")
    answer, settings = client.tensors(step, {"hidden": f32(STATES)}, {"position": "0"})
    assert (answer["hidden"].shape, settings) == ((1, 3, WIDTH), {})
    assert (np.frombuffer(answer["hidden"].data, np.float32).reshape(1, 3, WIDTH) == STATES / 2).all()
    client.tensors(step, {"hidden": f32(STATES)}, {"position": "2", "want": "last"})
    assert node.session.asked == [((3, WIDTH), 0, "all"), ((3, WIDTH), 2, "last")]
    assert node.opened == [RouteWish(node.session.model, 16, 60.0)]


def test_what_was_opened_is_told(client: Client, node: SessionNode) -> None:
    document = client.call("POST", PATH, {"model": "demo", "start": 1, "end": 4, "max_tokens": 8, "timeout": 3}, 10)
    assert document == {
        "id": node.session.session.hex(), "model": "demo", "start": 1, "end": 4, "max_tokens": 8, "width": WIDTH,
        "dtype": "float32",
    }  # fmt: skip
    assert node.opened == [RouteWish(node.session.model, 8, 3.0, Span(1, 4))]


def open_with(client: Client, tensors: dict[str, Tensor], **settings: str) -> dict[str, Any]:
    body = b"".join(encode(tensors, {"model": "demo", **settings}))
    return client.send("POST", PATH, body, TENSORS_TYPE)


def test_a_session_may_bring_deep_prompts(client: Client, node: SessionNode) -> None:
    prompts = f32(np.arange(3 * 2 * WIDTH).reshape(3, 2, WIDTH))
    document = open_with(client, {"prompts": prompts}, start="1", end="4", max_tokens="8", timeout="3")
    assert (document["id"], document["start"], document["end"]) == (node.session.session.hex(), 1, 4)
    part = Part("prompts", "float32", (3, 2, WIDTH), bytes(prompts.data))
    assert node.opened == [RouteWish(node.session.model, 8, 3.0, Span(1, 4), part)]


@pytest.mark.parametrize(
    ("tensors", "settings", "word"),
    [
        ({}, {"max_tokens": "8"}, "prompts is missing"),
        ({"prompt": np.zeros((BLOCKS, 2, WIDTH))}, {"max_tokens": "8"}, "did you mean prompts"),
        ({"prompts": np.zeros((BLOCKS - 1, 2, WIDTH))}, {"max_tokens": "8"}, r"it is \(6, length, 4\)"),
        ({"prompts": np.zeros((BLOCKS, 9, WIDTH))}, {"max_tokens": "8"}, "1 to the 8 tokens of the session"),
        ({"prompts": np.full((BLOCKS, 2, WIDTH), np.nan)}, {"max_tokens": "8"}, "not a number"),
        ({"prompts": np.zeros((BLOCKS, 2, WIDTH))}, {}, "max_tokens must be"),
        ({"prompts": np.zeros((BLOCKS, 2, WIDTH))}, {"max_tokens": "x"}, "decimal digits"),
        ({"prompts": np.zeros((BLOCKS, 2, WIDTH))}, {"max_tokens": "8", "want": "all"}, "no setting 'want'"),
    ],
)
def test_deep_prompts_that_can_t_be_are_refused(
    client: Client, node: SessionNode, tensors: dict[str, Any], settings: dict[str, str], word: str
) -> None:
    with pytest.raises(ApiError, match=word) as caught:
        open_with(client, {name: f32(values) for name, values in tensors.items()}, **settings)
    assert (caught.value.http_status, node.opened) == (400, [])


def test_deep_prompts_that_no_server_takes_are_refused(
    client: Client, node: SessionNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_requests, "OPEN_PROMPTS_BYTES_MAX", 100)
    with pytest.raises(ApiError, match="use shorter ones"):
        open_with(client, {"prompts": f32(np.zeros((BLOCKS, 2, WIDTH)))}, max_tokens="8")
    assert node.opened == []


def test_a_deleted_session_is_gone(client: Client, node: SessionNode) -> None:
    step = opened(client)
    client.call("DELETE", step.removesuffix("/step"), None, 10)
    assert node.session.closed
    for method, path in (("DELETE", step.removesuffix("/step")), ("POST", step)):
        with pytest.raises(ApiError) as caught:
            client.call(method, path, None, 10)
        assert (caught.value.http_status, caught.value.code) == (404, "unknown-session")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": CONTEXT + 1}, "context"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"start": 4, "end": 4}, "0:6"),
        ({"end": 7}, "0:6"),
        ({"model": 5}, "model"),
        ({"timeout": -1}, "timeout"),
        ({"max_token": 5}, "max_token"),
    ],
)
def test_sessions_that_can_t_be_are_refused(client: Client, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ApiError, match=word) as caught:
        opened(client, **settings)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("states", "settings", "word"),
    [
        (STATES, {}, "position"),
        (STATES, {"position": "-1"}, "position"),
        (STATES, {"position": "0", "want": "some"}, "want"),
        (STATES, {"position": "0", "wants": "all"}, "did you mean want"),
        (STATES[0], {"position": "0"}, "shape"),
        (STATES[:, :0], {"position": "0"}, "shape"),
        (STATES[:, :, :2], {"position": "0"}, "shape"),
        (np.concatenate([STATES, STATES]), {"position": "0"}, "shape"),
        (STATES * np.nan, {"position": "0"}, "not a number"),
    ],
)
def test_steps_that_can_t_be_are_refused(
    client: Client, node: SessionNode, states: Any, settings: dict[str, str], word: str
) -> None:
    step = opened(client)
    with pytest.raises(ApiError, match=word) as caught:
        client.tensors(step, {"hidden": f32(states)}, settings)
    assert caught.value.http_status == 400
    assert node.session.asked == []


def test_a_gap_is_a_conflict(client: Client, node: SessionNode) -> None:
    step = opened(client)
    node.session.error = SessionConflict("The session has 3 tokens, so position 5 leaves a gap.", 3)
    with pytest.raises(ApiError, match="3 tokens") as caught:
        client.tensors(step, {"hidden": f32(STATES)}, {"position": "5"})
    assert (caught.value.http_status, caught.value.code) == (409, "session-conflict")


def test_a_step_without_servers_says_so(client: Client, node: SessionNode) -> None:
    step = opened(client)
    node.session.error = Unserved("Nobody serves blocks 4:6 of demo.")
    with pytest.raises(ApiError, match="blocks 4:6") as caught:
        client.tensors(step, {"hidden": f32(STATES)}, {"position": "0"})
    assert caught.value.http_status == 503


def test_too_many_sessions_are_told_to_come_back(client: Client, node: SessionNode) -> None:
    node.full = True
    with pytest.raises(ApiError) as caught:
        opened(client)
    assert (caught.value.http_status, caught.value.code) == (503, "busy")
