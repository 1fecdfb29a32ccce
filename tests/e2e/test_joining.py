"""Daemons that find their own place: gaps that newcomers take, two models in one network, restarts, leaving, and stolen shelves."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from blocks.demo import MODEL_DIRECTORY
from blocks.model.exact import Reference
from blocks.text import TextCodec
from peerd.client import ApiError
from peerd.loopback import running, start_daemon
from tests.e2e.processes import Network, greedy, peer_of, span_of, wait_until
from tests.models import make_tiny

TOKENS = 24
CHAT = [{"role": "user", "content": "Tell me a story about a fox."}]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A server of most of the demo; one told nothing but how much; one of two models; and a client without any file."""
    directory = tmp_path_factory.mktemp("join")
    make_tiny("llama", directory / "little")
    made = Network(directory)
    with running(made.daemons):
        made.start("most", "--max-blocks", "8")
        made.start("client", "--serve-blocks", "none", listen=None)
        wait_until(lambda: bool(made.servers("demo")))
        made.start("rest", "--max-blocks", "4")
        wait_until(lambda: made.replicas("demo", 12) == [1] * 12)
        made.start("both", "--model", str(directory / "little"), "--model", "demo", "--max-blocks", "4")
        wait_until(lambda: made.replicas("little", 4) == [1] * 4 and sum(made.replicas("demo", 12)) == 16)
        yield made
        made.check_logs()


def chat_ids() -> list[int]:
    return list(TextCodec.from_directory(MODEL_DIRECTORY).encode_chat(CHAT, now=datetime.now(UTC)))


def test_a_newcomer_told_nothing_follows_the_network_and_takes_the_gap(network: Network) -> None:
    spans = {server["peer"]: span_of(server) for server in network.servers("demo")}
    first, second = spans[peer_of(network.by_name["most"])], spans[peer_of(network.by_name["rest"])]
    assert (first[1] - first[0], second[1] - second[0]) == (8, 4)
    assert sorted((*first, *second)) in ([0, 4, 4, 12], [0, 8, 8, 12])
    assert [model["name"] for model in network.client("rest").status()["models"]] == ["demo"]


def test_one_daemon_serves_two_models(network: Network) -> None:
    served = network.client("both").status()["models"]
    assert [(model["name"], model["state"]) for model in served] == [("little", "online"), ("demo", "online")]
    with pytest.raises(ApiError, match="demo, little") as caught:
        network.client().complete("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert (caught.value.http_status, caught.value.code) == (400, "model-required")


def test_altered_files_of_a_server_are_refused_and_true_ones_taken(network: Network) -> None:
    """The client has no file of this directory's; its only server hands out a tokenizer that the manifest doesn't know."""
    tokenizer = network.directory / "little" / "tokenizer.json"
    true = tokenizer.read_bytes()
    body = {"model": "little", "prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True}
    tokenizer.write_bytes(true.replace(b'"model"', b'"mod3l"', 1))
    try:
        with pytest.raises(ApiError, match=r"tokenizer\.json") as caught:
            network.client().complete("/v1/completions", {**body, "timeout": 0.1})
        assert (caught.value.http_status, caught.value.code) == (503, "model-unavailable")
    finally:
        tokenizer.write_bytes(true)
    expected = Reference.load(str(network.directory / "little")).greedy((5, 6, 7), TOKENS)
    assert greedy(network.client(), body)[0] == expected


def test_whole_streamed_and_chat_answers_are_the_tokens_of_local_transformers(network: Network) -> None:
    codec, client, ids = TextCodec.from_directory(MODEL_DIRECTORY), network.client(), chat_ids()
    expected = Reference.load("demo").greedy(ids, TOKENS)
    settings = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    whole = client.complete("/v1/completions", {**settings, "prompt": ids})
    assert whole["choices"][0]["token_ids"] == expected
    assert len(whole["peerd"]["route"]) >= 2
    assert greedy(client, {**settings, "prompt": ids})[0] == expected
    chat = client.complete("/v1/chat/completions", {**settings, "messages": CHAT})
    assert chat["choices"][0]["token_ids"] == expected
    text = codec.decode(expected)
    assert chat["choices"][0]["message"]["content"] == text
    pieces = [
        choice["delta"].get("content") or ""
        for event in client.stream("/v1/chat/completions", {**settings, "messages": CHAT})
        for choice in event["choices"]
    ]
    assert "".join(pieces) == text


def test_a_killed_daemon_comes_back_as_itself(network: Network) -> None:
    """Same identity, same port, the stale socket replaced, and the network found without being told."""
    before = network.by_name["client"]
    before.kill()
    assert before.socket_path.exists()
    network.add(start_daemon("client", before.state_dir.parent, listen=None))
    wait_until(lambda: network.client().status()["state"] == "online")
    assert network.by_name["client"].join_address == before.join_address


def test_a_daemon_that_is_stopped_is_gone_from_the_swarm_within_two_seconds(network: Network) -> None:
    wait_until(lambda: any(server["peer"] == peer_of(network.by_name["rest"]) for server in network.servers("demo")))
    gone = network.by_name["rest"]
    gone.process.terminate()
    assert gone.process.wait(10) == 0

    def listed() -> list[str]:
        return [s["peer"] for model in network.client().swarm()["models"] for s in model["servers"]]

    wait_until(lambda: peer_of(gone) not in listed(), timeout_s=2.0)
