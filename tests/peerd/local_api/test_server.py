"""The API over a real Unix socket, asked by the real client and by bytes that no client would send."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peerd.client import ApiError, Client, DaemonLost
from peerd.local_api.limits import BODY_BYTES_MAX
from tests.peerd.scripted import (
    MODEL_ID,
    Fail,
    Hang,
    Pending,
    ScriptedNode,
    Unserved,
    Wait,
    answering,
    demo_codec,
    says,
)

TEXT = "One day a fox went out."


@pytest.fixture
def node() -> ScriptedNode:
    return ScriptedNode()


@pytest.fixture
def client(node: ScriptedNode, tmp_path: Path) -> Iterator[Client]:
    with answering(node, tmp_path / "run" / "peerd.sock") as path:
        yield Client(path)


def raw(path: str, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def post(path: str, target: str, body: bytes) -> tuple[int, dict[str, Any]]:
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(path, head.encode() + body)
    top, _, content = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(content)


def test_status_shows_the_node(client: Client) -> None:
    status = client.status()
    assert status["peer_id"] == "12D3KooWtest"
    assert status["addresses"] == ["/ip4/127.0.0.1/tcp/4001/p2p/12D3KooWtest"]
    assert status["models"] == [{"id": MODEL_ID, "name": "demo", "span": "0:6", "state": "online", "progress": 1.0}]
    assert status["version"] == "0.0-test"
    assert status["pid"] == os.getpid()
    assert status["sessions"][0]["route"][1]["span"] == "6:12"


def test_the_swarm_names_who_covers_what_and_what_nobody_does(client: Client) -> None:
    (model,) = client.swarm()["models"]
    assert (model["name"], model["blocks"]) == ("demo", 12)
    assert [(server["span"], server["state"]) for server in model["servers"]] == [("0:6", "online"), ("6:8", "joining")]
    assert model["unserved"] == ["6:12"]


def test_models_are_listed_as_openai_lists_them(client: Client) -> None:
    listed = client.models()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["demo"]
    assert client.call("GET", "/v1/models/demo")["object"] == "model"
    with pytest.raises(ApiError, match="no model 'other'"):
        client.call("GET", "/v1/models/other")


def test_a_completion_is_answered_whole(client: Client, node: ScriptedNode) -> None:
    reply = client.complete("/v1/completions", {"prompt": "Tell", "temperature": 0, "return_token_ids": True})
    (choice,) = reply["choices"]
    expected = [step.token for step in says(TEXT)]  # type: ignore[union-attr]
    assert choice["text"] == TEXT
    assert choice["token_ids"] == expected
    assert choice["finish_reason"] == "stop"
    assert reply["object"] == "text_completion"
    assert reply["usage"]["completion_tokens"] == len(expected)
    assert reply["usage"]["prompt_tokens"] == len(node.decodes[0].request.prompt)
    assert [hop["span"] for hop in reply["peerd"]["route"]] == ["0:6", "6:12"]
    assert reply["peerd"]["tokens_per_s"] == 42.0
    assert reply["peerd"]["replays"] == 0


def test_a_streamed_completion_says_the_same_in_pieces(client: Client) -> None:
    events = list(client.stream("/v1/completions", {"prompt": "Tell", "return_token_ids": True}))
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == TEXT
    ids = [token for event in events for choice in event["choices"] for token in choice["token_ids"]]
    assert ids == [step.token for step in says(TEXT)]  # type: ignore[union-attr]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["peerd"]["replays"] == 0
    assert all("peerd" not in event for event in events[:-1])


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: Client) -> None:
    body = {"prompt": "Tell", "stream_options": {"include_usage": True}}
    events = list(client.stream("/v1/completions", body))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(says(TEXT))
    assert "peerd" in events[-1]


def test_a_chat_goes_through_the_template(client: Client, node: ScriptedNode) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "What do bees make?"}]}]}
    reply = client.complete("/v1/chat/completions", body)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": TEXT}
    prompt = demo_codec().decode(node.decodes[0].request.prompt)
    assert "What do bees make?" in prompt
    events = list(client.stream("/v1/chat/completions", body))
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == TEXT
    assert events[0]["object"] == "chat.completion.chunk"


def test_every_setting_reaches_the_session(client: Client, node: ScriptedNode) -> None:
    body = {
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 11,
        "seed": 12,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "ignore_eos": True,
        "timeout": 3.5,
    }
    client.complete("/v1/completions", body)
    request = node.decodes[0].request
    assert request.prompt == (5, 6, 7)
    assert request.max_new_tokens == 9
    assert request.ignore_eos
    assert request.wait_s == 3.5
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.9, 11, 12)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.25, -0.5, 1.25)


def test_requests_without_a_seed_differ_in_theirs(client: Client, node: ScriptedNode) -> None:
    for _ in range(2):
        client.complete("/v1/completions", {"prompt": "a"})
    assert node.decodes[0].request.params.seed != node.decodes[1].request.params.seed


def test_a_stop_string_ends_the_text_and_the_session(client: Client, node: ScriptedNode) -> None:
    node.script = [*says(TEXT, end=False), Hang()]
    reply = client.complete("/v1/completions", {"prompt": "a", "stop": [" went"]})
    assert reply["choices"][0]["text"] == "One day a fox"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert node.decodes[0].cancelled


def test_what_is_waited_for_is_told_as_a_comment(client: Client, node: ScriptedNode) -> None:
    pending = Pending("blocks 6:12 of demo are being loaded")
    node.script = [Wait("waiting", pending), *says("a b")[:1], Wait("replaying"), *says("c")]
    comments: list[str] = []
    events = list(client.stream("/v1/completions", {"prompt": "x"}, comments.append))
    assert comments[0] == "waiting blocks 6:12 of demo are being loaded"
    assert events[-1]["peerd"]["replays"] == 1


def test_a_model_that_is_not_known_yet_is_waited_for(client: Client, node: ScriptedNode) -> None:
    node.pending_opens = 2
    comments: list[str] = []
    events = list(client.stream("/v1/completions", {"prompt": "x"}, comments.append))
    assert comments == ["waiting No model is known yet."] * 2
    assert "".join(choice["text"] for event in events for choice in event["choices"]) == TEXT
    node.pending_opens = 1
    assert client.complete("/v1/completions", {"prompt": "x"})["choices"][0]["text"] == TEXT


def test_waiting_for_a_model_ends_with_the_request_s_patience(client: Client, node: ScriptedNode) -> None:
    node.pending_opens = 10
    with pytest.raises(ApiError, match="No model is known yet") as caught:
        client.complete("/v1/completions", {"prompt": "x", "timeout": 0})
    assert (caught.value.http_status, node.pending_opens) == (503, 9)


def test_blocks_that_nobody_serves_are_503_even_of_a_stream(client: Client, node: ScriptedNode) -> None:
    node.script = [Fail(Unserved("Nobody serves blocks 4:8 of demo."))]
    for ask in (lambda: client.complete("/v1/completions", {"prompt": "x"}),
                lambda: list(client.stream("/v1/completions", {"prompt": "x"}))):  # fmt: skip
        with pytest.raises(ApiError, match="blocks 4:8") as caught:
            ask()
        assert (caught.value.http_status, caught.value.code, caught.value.exit_code) == (503, "blocks-unserved", 50)


def test_a_failure_in_mid_stream_is_its_last_event(client: Client, node: ScriptedNode) -> None:
    node.script = [*says("One day", end=False), Fail(Unserved("Nobody serves blocks 4:8 of demo."))]
    events = client.stream("/v1/completions", {"prompt": "x"})
    assert next(events)["choices"][0]["text"].startswith("One")
    with pytest.raises(ApiError, match="blocks 4:8"):
        list(events)


def test_closing_the_connection_cancels_the_session(client: Client, node: ScriptedNode) -> None:
    node.script = [*says("One day a fox", end=False), Hang()]
    events = client.stream("/v1/completions", {"prompt": "x"})
    next(events)
    events.close()
    assert node.wait_until(lambda: node.decodes[0].cancelled, 1.0)


def test_closing_the_connection_before_the_first_token_cancels_too(client: Client, node: ScriptedNode) -> None:
    node.script = [Hang()]
    body = b'{"prompt": "x"}'
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(client.socket_path)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert node.wait_until(lambda: bool(node.decodes))
    assert node.wait_until(lambda: node.decodes[0].cancelled, 1.0)


def test_stopping_the_daemon_ends_answers_with_a_reason(node: ScriptedNode, tmp_path: Path) -> None:
    node.script = [*says("One day", end=False), Hang()]
    with answering(node, tmp_path / "run" / "s") as path:
        events = Client(path).stream("/v1/completions", {"prompt": "x"})
        next(events)
    with pytest.raises(ApiError, match="stopping") as caught:
        list(events)
    assert caught.value.code == "stopping"


def test_stop_is_passed_on_to_the_node(client: Client, node: ScriptedNode) -> None:
    assert client.stop() == {"stopping": True, "pid": os.getpid()}
    assert node.wait_until(lambda: node.stop_requests == 1)


def test_metrics_count_requests_and_tokens(client: Client) -> None:
    client.complete("/v1/completions", {"prompt": "Tell"})
    text = client.metrics()
    assert f'peerd_generated_tokens_total{{model="demo"}} {float(len(says(TEXT)))}' in text
    assert 'peerd_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert "peerd_first_token_seconds_count 1.0" in text
    assert "peerd_generations 0.0" in text
    assert 'peerd_info{peer_id="12D3KooWtest",version="0.0-test"} 1.0' in text


BAD_REQUESTS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "invalid-request", "prompt must be"),
    ({"prompt": []}, "invalid-prompt", "empty"),
    ({"prompt": [1, "a"]}, "unsupported-parameter", "one prompt"),
    ({"prompt": ["a", "b"]}, "unsupported-parameter", "one prompt"),
    ({"prompt": [1.5]}, "invalid-request", "whole numbers"),
    ({"prompt": [True]}, "invalid-request", "whole numbers"),
    ({"prompt": [10**9]}, "invalid-prompt", "token id 1000000000"),
    ({"prompt": [-1]}, "invalid-prompt", "token id -1"),
    ({"prompt": "a", "n": 2}, "unsupported-parameter", "n is not supported"),
    ({"prompt": "a", "n": True}, "unsupported-parameter", "n is not supported"),
    ({"prompt": "a", "logprobs": 3}, "unsupported-parameter", "logprobs"),
    ({"prompt": "a", "echo": True}, "unsupported-parameter", "echo"),
    ({"prompt": "a", "temprature": 1}, "invalid-request", "did you mean temperature"),
    ({"prompt": "a", "messages": []}, "invalid-request", "no parameter 'messages'"),
    ({"prompt": "a", "temperature": "hot"}, "invalid-sampling", "temperature"),
    ({"prompt": "a", "temperature": -1}, "invalid-sampling", "temperature"),
    ({"prompt": "a", "top_p": 0}, "invalid-sampling", "top_p"),
    ({"prompt": "a", "seed": 1.5}, "invalid-sampling", "seed"),
    ({"prompt": "a", "max_tokens": 0}, "invalid-request", "max_tokens"),
    ({"prompt": "a", "max_tokens": "many"}, "invalid-request", "max_tokens"),
    ({"prompt": "a", "max_tokens": 5000}, "prompt-too-long", "the context of demo is 1024"),
    ({"prompt": [5] * 1024}, "prompt-too-long", "has 1024 tokens"),
    ({"prompt": "a", "stop": 5}, "invalid-request", "stop"),
    ({"prompt": "a", "stop": [""]}, "invalid-stop", "stop string"),
    ({"prompt": "a", "stop": ["x"] * 17}, "invalid-stop", "At most 16"),
    ({"prompt": "a", "stream": "yes"}, "invalid-request", "stream must be"),
    ({"prompt": "a", "timeout": -1}, "invalid-request", "timeout"),
    ({"prompt": "a", "model": 3}, "invalid-request", "model must be"),
]


@pytest.mark.parametrize(("body", "code", "words"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_request_is_one_sentence(client: Client, body: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        client.call("POST", "/v1/completions", body)
    assert (caught.value.http_status, caught.value.code) == (400, code)
    assert client.status()["state"] == "online"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages must be a list"),
        ([], "messages must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "user"}], r"messages\[0\].content must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "parts of type text"),
        ([{"role": "pirate", "content": "arr"}], "roles of this model"),
    ],
)
def test_a_bad_conversation_is_one_sentence(client: Client, messages: object, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        client.call("POST", "/v1/chat/completions", {"messages": messages})
    assert caught.value.http_status == 400


def test_an_unknown_model_is_404_and_a_missing_name_lists_them(node: ScriptedNode, client: Client) -> None:
    node.names = ("demo", "org/other")
    with pytest.raises(ApiError, match="No model is called 'x'") as caught:
        client.complete("/v1/completions", {"prompt": "a", "model": "x"})
    assert (caught.value.http_status, caught.value.exit_code) == (404, 40)
    with pytest.raises(ApiError, match="demo, org/other") as caught:
        client.complete("/v1/completions", {"prompt": "a"})
    assert (caught.value.http_status, caught.value.exit_code) == (400, 54)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"nonsense", b'{"prompt": NaN', b"\xff\xfe", b"[" * 100000])
def test_malformed_json_is_400(client: Client, body: bytes) -> None:
    status, document = post(client.socket_path, "/v1/completions", body)
    assert (status, document["error"]["code"]) == (400, "malformed-json")
    assert document["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["prompt", "model", "user"])
def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_not(client: Client, field: str) -> None:
    body = {"prompt": "a", field: "\ud83e"}
    status, document = post(client.socket_path, "/v1/completions", json.dumps(body).encode())
    assert (status, document["error"]["code"]) == (400, "malformed-json")
    assert client.complete("/v1/completions", {"prompt": "\U0001f98a"})["choices"][0]["text"] == TEXT


def test_not_a_number_is_refused_as_a_setting(client: Client) -> None:
    status, document = post(client.socket_path, "/v1/completions", b'{"prompt": "a", "temperature": NaN}')
    assert (status, document["error"]["code"]) == (400, "invalid-sampling")


def test_a_body_over_the_limit_is_413(client: Client) -> None:
    status, document = post(client.socket_path, "/v1/completions", b'{"prompt": "' + b"a" * BODY_BYTES_MAX + b'"}')
    assert (status, document["error"]["code"]) == (413, "request-too-large")


def test_unknown_paths_and_methods_are_told(client: Client) -> None:
    with pytest.raises(ApiError, match="nothing at /v2") as caught:
        client.call("GET", "/v2")
    assert caught.value.http_status == 404
    with pytest.raises(ApiError, match="takes POST, not GET") as caught:
        client.call("GET", "/api/v0/stop")
    assert caught.value.http_status == 405


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20000 + b"\r\n\r\n",
    ],
    ids=["tls", "version", "long header"],
)
def test_what_is_no_http_is_refused_and_the_daemon_lives_on(
    client: Client, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = raw(client.socket_path, garbage)
    assert answer.startswith(b"HTTP/1.") and b" 400 " in answer.splitlines()[0]
    assert b"Traceback" not in answer
    assert "Traceback" not in caplog.text
    assert client.status()["state"] == "online"


def test_our_own_bug_is_500_without_its_details(client: Client, node: ScriptedNode) -> None:
    node.broken = True
    with pytest.raises(ApiError, match="its log says why") as caught:
        client.status()
    assert (caught.value.http_status, caught.value.code) == (500, "internal")
    assert "secret" not in str(caught.value)


def test_a_session_that_fails_without_words_is_500(client: Client, node: ScriptedNode) -> None:
    node.script = [Fail(None)]
    with pytest.raises(ApiError, match="see its log") as caught:
        client.complete("/v1/completions", {"prompt": "a"})
    assert caught.value.http_status == 500


def test_other_users_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerd.local_api.server.peer_uid", lambda connection: os.getuid() + 1)
    with pytest.raises(ApiError, match="another user") as caught:
        client.status()
    assert (caught.value.http_status, caught.value.code) == (403, "forbidden")


def test_a_client_that_is_cut_off_says_so(node: ScriptedNode, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener:
        client = Client(tmp_path / "s", timeout_s=0.2)
        with pytest.raises(DaemonLost, match="doesn't answer"):
            client.status()
