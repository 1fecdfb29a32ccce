"""Whatever a daemon is given, from its command line to the inside of its secured streams: one sentence, a code, and it lives on."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from blocks.demo import MODEL_DIRECTORY
from blocks.model.exact import Reference
from blocks.service import DATA_PROTOCOL, SESSION_PROTOCOL
from overlay.connection import Connection
from overlay.errors import PeerdError
from overlay.host import Host
from overlay.identity import Identity, PeerId
from overlay.multiaddr import Multiaddr
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part
from overlay.rpc.unary import RemoteError, call
from overlay.stream import Priority, Stream
from peerd.client import ApiError
from peerd.loopback import running, start_daemon
from peerd.model_exchange import MODEL_PROTOCOL
from tests.e2e.processes import Network, greedy, peer_of, wait_until
from tests.models import make_tiny
from tests.overlay.network import system_ports

PROMPT = "Tell me"
TOKENS = 12
DHT_PROTOCOL = "/peerd/dht/1"
PROTOCOLS = (SESSION_PROTOCOL, DATA_PROTOCOL, DHT_PROTOCOL, MODEL_PROTOCOL, "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0")
JUNK = (bytes(200), b"\xff" * 300, b"\x01\x01\x00\x10\x00\x00\x00\x05" + b"\x00" * 8 + b"z" * 400)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """One daemon that serves the demo to itself."""
    made = Network(tmp_path_factory.mktemp("bad"))
    with running(made.daemons):
        made.start("client", "--model", "demo", "--torch-threads", "1")
        wait_until(lambda: made.replicas("demo", 12) == [1] * 12)
        yield made
        made.check_logs()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    from blocks.text import TextCodec

    return Reference.load("demo").greedy(TextCodec.from_directory(MODEL_DIRECTORY).encode(PROMPT), TOKENS)


def serves_on(network: Network, expected: list[int]) -> None:
    ids, _ = greedy(network.client(), {"prompt": PROMPT, "max_tokens": TOKENS})
    assert ids == expected
    network.check_logs()


# --- the port ---


def test_garbage_on_the_port_ends_that_connection_alone(network: Network, expected: list[int]) -> None:
    port = int(network.by_name["client"].join_address.split("/tcp/")[1].split("/")[0])
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\xff" * 3000):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(junk)
            with suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass  # until the daemon hangs up
    serves_on(network, expected)


async def junk_ciphertext(connection: Connection, host: Host) -> None:
    assert connection._transport is not None
    connection._transport.write(b"\x00\x40" + b"\xee" * 64)
    await connection.wait_closed()


async def junk_frames(connection: Connection, host: Host) -> None:
    assert connection._transport is not None
    assert connection._sender is not None
    connection._transport.write(connection._sender.seal_framed(b"\xff" * 64))
    await connection.wait_closed()


async def junk_negotiation(connection: Connection, host: Host) -> None:
    for junk in (b"\xff" * 2000, b"\x00", b"\x05hello", b"\x13/multistream/9.9.9\n"):
        stream = Stream(connection, connection.session.open(), Priority.CONTROL, 0.0)
        stream.write_nowait(junk)
        connection.pump()
        with suppress(PeerdError):
            async with asyncio.timeout(1):
                with suppress(TimeoutError):  # what may still become a proposal is waited for
                    while await stream.read():
                        pass


async def junk_messages(connection: Connection, host: Host) -> None:
    for protocol in PROTOCOLS:
        for junk in JUNK:
            stream = await host.open_stream(connection.remote_peer, protocol)
            stream.write_nowait(junk)
            with suppress(PeerdError):
                await stream.close_write()
                while await stream.read():
                    pass


async def junk_sessions(connection: Connection, host: Host) -> None:
    """Well signed, well formed, and nonsense."""
    nonsense = [
        Message("open", {"s": b"short", "e": [1, 1], "h": 0}),
        Message(
            "open", {"s": bytes(16), "e": [1, 1], "h": 0, "model": bytes(32), "class": "x", "route": [[1, 2, 3, 4]]}
        ),
        Message("window", {"s": bytes(16), "e": [2**63, -1], "h": 10**9, "b": 0, "n": 1, "o": 0, "c": 1, "w": "all"}),
        Message("window", {}, (Part("hidden", "float32", (1, 4), bytes(16)),)),
        Message("cancel", {"s": {}, "e": None}),
        Message("no such kind", {"crit": ["gravity"]}),
    ]
    for protocol in (SESSION_PROTOCOL, DATA_PROTOCOL):
        for message in nonsense:
            stream = await host.open_stream(connection.remote_peer, protocol)
            channel = MessageChannel(stream, host.identity)
            channel.send(message)
            with suppress(PeerdError, TimeoutError):
                async with asyncio.timeout(0.5):
                    await channel.receive()
            channel.close()


async def junk_calls(connection: Connection, host: Host) -> None:
    for protocol in (DHT_PROTOCOL, MODEL_PROTOCOL):
        for kind in ("find", "find_node", "find_value", "get", "put", "store", "file", "tensor", "x" * 200):
            for header in (
                {},
                {"key": 7, "record": "no"},
                {"key": bytes(32), "records": [bytes(100)]},
                {"model": b"m", "offset": -1},
            ):
                with pytest.raises((RemoteError, PeerdError)):
                    await call(host, connection.remote_peer, protocol, Message(kind, header), timeout_s=5)


@pytest.mark.parametrize(
    "attack", [junk_ciphertext, junk_frames, junk_negotiation, junk_messages, junk_sessions, junk_calls]
)
def test_garbage_behind_the_handshake_changes_nothing(network: Network, expected: list[int], attack) -> None:  # type: ignore[no-untyped-def]
    daemon = network.by_name["client"]

    async def main() -> None:
        async with asyncio.timeout(60), Host(Identity(os.urandom(32)), system_ports()) as host:
            address = Multiaddr.parse(daemon.join_address)
            await attack(await host.connect(PeerId.from_text(peer_of(daemon)), (address,)), host)

    asyncio.run(main())
    serves_on(network, expected)
    assert network.gauge("client", "sessions_served") == 0


# --- the socket ---


def test_a_prompt_longer_than_the_context_is_told_both_numbers(network: Network) -> None:
    with pytest.raises(ApiError, match=r"The prompt has 1500 tokens.* 1024") as caught:
        network.client().complete("/v1/completions", {"prompt": [5] * 1500})
    assert (caught.value.http_status, caught.value.code) == (400, "prompt-too-long")


def test_an_unknown_model_is_404_and_lists_what_there_is(network: Network) -> None:
    with pytest.raises(ApiError, match=r"'zebra'.*demo") as caught:
        network.client().complete("/v1/completions", {"model": "zebra", "prompt": "x"})
    assert (caught.value.http_status, caught.value.code) == (404, "unknown-model")


def test_malformed_json_is_400(network: Network) -> None:
    connection = http.client.HTTPConnection("localhost")
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(network.by_name["client"].socket_path))
        connection.sock = raw
        connection.request("POST", "/v1/completions", b'{"prompt": ', {"Content-Type": "application/json"})
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        response.close()
    assert (response.status, error["code"]) == (400, "malformed-json")


# --- the start ---


def ends(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a daemon that can't do what it was told."""
    daemon = start_daemon("daemon", tmp_path, *arguments)
    with running([daemon]):
        return daemon.process.wait(90), daemon.log_path.read_text()


def test_a_port_in_use_ends_the_start(network: Network, tmp_path: Path) -> None:
    port = network.by_name["client"].join_address.split("/tcp/")[1].split("/")[0]
    code, log = ends(tmp_path, "--serve-blocks", "none", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert code == 10
    assert re.fullmatch(rf"peerd: .*127\.0\.0\.1.*{port}.*\n", log)


def test_a_socket_that_a_live_daemon_serves_is_left_to_it(
    network: Network, tmp_path: Path, expected: list[int]
) -> None:
    taken = network.by_name["client"].socket_path
    code, log = ends(tmp_path, "--serve-blocks", "none", "--socket", str(taken))
    assert code == 17
    assert re.fullmatch(rf"peerd: A live daemon already answers at {taken};.*\n", log)
    serves_on(network, expected)


@pytest.mark.parametrize("join", ["nonsense", "/ip4/127.0.0.1", "/ip4/127.0.0.1/tcp/1/p2p/Qm", "/ip4/999.0.0.1/tcp/1"])
def test_a_malformed_join_ends_the_start(tmp_path: Path, join: str) -> None:
    code, log = ends(tmp_path, "--join", join)
    assert code == 2
    assert re.fullmatch(r"peerd: --join: .*\n", log)


@pytest.mark.parametrize("how", ["missing", "empty", "damaged", "outside"])
def test_a_model_that_cannot_be_served_ends_the_start_before_it_is_ready(tmp_path: Path, how: str) -> None:
    model = tmp_path / "little"
    arguments, code, sentence = ("--model", str(model)), 40, f"peerd: {model} is not a directory"
    if how == "empty":
        model.mkdir()
        sentence = f"peerd: {model} has no config.json"
    if how == "damaged":
        path = make_tiny("llama", model, num_hidden_layers=1) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        code, sentence = 41, f"peerd: {path} is damaged or no safetensors file (it should have "
    if how == "outside":
        arguments, code = ("--model", "demo", "--serve-blocks", "4:13"), 2
        sentence = "peerd: demo has blocks 0:12; 4:13 is no span of it."
    daemon = start_daemon("daemon", tmp_path, *arguments)
    with running([daemon]):
        assert daemon.process.wait(90) == code
        assert daemon.process.stdout is not None
        assert daemon.process.stdout.read() == b""  # never said ready
        assert not daemon.socket_path.exists()
    log = daemon.log_path.read_text()
    assert log.startswith(sentence)
    assert len(log.splitlines()) == 1


def test_an_unreachable_network_is_warned_of_once_and_tried_again(tmp_path: Path) -> None:
    """Somebody accepts and hangs up: the daemon stays joining, answers meanwhile, and comes back."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        made = Network(tmp_path)
        with running(made.daemons):
            made.start("client", "--join", f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}")
            for _ in range(3):
                silent.accept()[0].close()
            status = made.client().status()
            assert (status["state"], status["models"]) == ("joining", [])
            with pytest.raises(ApiError, match="looks for its network") as caught:
                made.client().complete("/v1/completions", {"prompt": "x", "timeout": 0.1})
            assert (caught.value.http_status, caught.value.code) == (503, "model-pending")
            log = made.by_name["client"].log_path.read_text()
            assert log.count("WARNING") == 1
            assert "known peers answers yet" in log
            made.check_logs()


def test_a_note_that_can_t_be_written_is_a_warning_and_the_daemon_leaves_in_good_order(tmp_path: Path) -> None:
    """As on a full disk: whom it met can't be kept, and that ends nothing."""
    made = Network(tmp_path)
    with running(made.daemons):
        made.start("first", "--serve-blocks", "none")
        second = made.start("client", "--serve-blocks", "none")
        wait_until((second.state_dir / "known-peers.json").exists)
        (second.state_dir / "known-peers.json.new").mkdir()  # where the new note would be written
        second.process.terminate()
        assert second.process.wait(60) == 0
    warnings = [line for line in second.log_path.read_text().splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "known peers could not be saved" in warnings[0]
    made.check_logs()
