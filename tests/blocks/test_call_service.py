"""The serving side of tensor calls: a node's own calls, leaving, callers that are slow, and how a call is cut into jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from blocks import call_service
from blocks.call_service import TENSORS_PROTOCOL
from blocks.engine.errors import ComputeFailed, DeviceBusy, NotLoaded
from blocks.model.errors import UnsupportedModel
from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import CallRequest
from blocks.protocol.device import JobResult
from overlay.errors import PeerdError
from overlay.rpc import signing
from overlay.rpc.channel import MessageChannel
from overlay.rpc.frame import encode_header
from overlay.rpc.signing import sign
from overlay.rpc.types import Message, Part
from overlay.stream import Stream
from peerd.calls.remote import call_remote
from routing.types import Span
from tests.models import make_tiny
from tests.peerd.calls.field import Field, Server, data
from tests.ring import CLASS, until

WHOLE = Span(0, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")
    return directory


def run(model: Path, work: Callable[[Field, Server], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), Field(model, len(WHOLE)) as field:
            await work(field, await field.server(0, len(WHOLE)))

    asyncio.run(main())


def backward_of(field: Field, call: bytes = b"c" * 16) -> CallRequest:
    batch = field.batch(prompts=len(WHOLE))
    model = field.model.model
    return CallRequest(calls.BACKWARD, call, model, str(CLASS), WHOLE, batch, field.grad(batch))


async def stream_to(field: Field, server: Server) -> Stream:
    addresses = server.node.host.addresses
    return await field.client.host.open_stream(server.node.host.peer_id, TENSORS_PROTOCOL, addresses=addresses)


def test_a_node_calls_itself_through_the_same_table(model: Path) -> None:
    async def work(field: Field, server: Server) -> None:
        request = backward_of(field)
        answers = [await server.service.call_local(request) for _ in range(2)]
        assert answers[0] is answers[1]
        assert len(server.device.jobs) == 1
        wired = await call_remote(field.client.host, server.peer, server.record.addresses, request)
        assert [data(part) for part in wired.parts] == [data(part) for part in answers[0].parts]
        assert len(server.device.jobs) == 2  # another peer's call, whatever its id

    run(model, work)


def test_a_server_that_leaves_takes_no_call_and_finishes_what_it_has(model: Path) -> None:
    async def work(field: Field, server: Server) -> None:
        def ask(call: bytes) -> Awaitable[object]:
            host = field.client.host
            return call_remote(host, server.peer, server.record.addresses, backward_of(field, call))

        server.device.is_open = False
        running = asyncio.ensure_future(ask(b"1" * 16))
        await until(lambda: bool(server.device.held))
        server.service.draining = True
        with pytest.raises(CallFault) as caught:
            await ask(b"2" * 16)
        assert (caught.value.code, caught.value.retryable) == ("draining", True)
        server.device.open()
        await running

    run(model, work)


def test_gradients_of_prompts_are_summed_over_the_pieces_of_a_call(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(field: Field, server: Server) -> None:
        whole = await server.service.call_local(backward_of(field, b"1" * 16))
        monkeypatch.setattr(call_service, "pieces_of", lambda rows, tokens: [(row, row + 1) for row in range(rows)])
        cut = await server.service.call_local(backward_of(field, b"2" * 16))
        assert len(server.device.jobs) == 1 + 5
        for one, other in zip(whole.parts, cut.parts, strict=True):
            assert (one.name, one.shape) == (other.name, other.shape)
            values = np.frombuffer(one.data, np.float32)
            np.testing.assert_allclose(values, np.frombuffer(other.data, np.float32), rtol=1e-4, atol=1e-5)
            assert np.abs(values).max() > 0.01

    run(model, work)


def test_a_request_whose_parts_never_come_gives_back_what_was_reserved(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_service, "UPLOAD_S", 0.1)
    monkeypatch.setattr(call_service, "UPLOAD_BYTES_PER_S", 1 << 30)
    monkeypatch.setattr(call_service, "PROGRESS_S", 0.02)

    async def work(field: Field, server: Server) -> None:
        stream = await stream_to(field, server)
        channel = MessageChannel(stream, field.client.host.identity)
        buffers: list[bytes] = []
        message = backward_of(field).to_message()
        with monkeypatch.context() as caught:
            caught.setattr(Stream, "write_nowait", lambda _, *parts, **__: buffers.extend(map(bytes, parts)))
            channel.send(type(message)(message.kind, {**message.header, "nonce": bytes(16)}, message.parts))
        stream.write_nowait(b"".join(buffers)[:-100])
        await until(lambda: server.service.bytes_reserved > 0)
        await until(lambda: server.service.bytes_reserved == 0)
        await until(lambda: stream.error is not None)
        assert server.device.jobs == []

    run(model, work)


def test_a_second_request_on_a_stream_ends_it_and_cancels_the_first(model: Path) -> None:
    async def work(field: Field, server: Server) -> None:
        server.device.is_open = False
        stream = await stream_to(field, server)
        channel = MessageChannel(stream, field.client.host.identity)
        message = backward_of(field).to_message()
        fresh = type(message)(message.kind, {**message.header, "nonce": bytes(16)}, message.parts)
        channel.send(fresh)
        await until(lambda: bool(server.device.held))
        channel.send(fresh)
        await until(lambda: stream.error is not None)
        await until(lambda: server.service.bytes_reserved == 0 and not server.service._work)

    run(model, work)


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (UnsupportedModel("no gradients here"), "unsupported", False),
        (DeviceBusy("full"), "busy", True),
        (NotLoaded("gone"), "not-served", True),
        (ComputeFailed("broken"), "failed", True),
    ],
    ids=str,
)
def test_a_devices_error_reaches_the_caller_under_its_code(
    model: Path, error: PeerdError, code: str, retryable: bool
) -> None:
    async def work(field: Field, server: Server) -> None:
        server.device.is_open = False
        asked = asyncio.ensure_future(
            call_remote(field.client.host, server.peer, server.record.addresses, backward_of(field))
        )
        await until(lambda: bool(server.device.held))
        ((job, done),) = server.device.held
        done(JobResult(job, error=error))
        with pytest.raises(CallFault, match=str(error)) as caught:
            await asked
        assert (caught.value.code, caught.value.retryable) == (code, retryable)
        await until(lambda: server.service.bytes_reserved == 0)

    run(model, work)


def test_the_bodies_of_a_call_are_hashed_once_on_each_side(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    honest = signing.digest_of

    def counting(parts: tuple[Part, ...]) -> bytes:
        if len(parts) > 1:
            hashed.append(parts[-1].name)
        return honest(parts)

    monkeypatch.setattr(signing, "digest_of", counting)
    monkeypatch.setattr(calls, "digest_of", counting)

    async def work(field: Field, server: Server) -> None:
        request = backward_of(field)
        answer = await call_remote(field.client.host, server.peer, server.record.addresses, request)
        assert hashed == [
            "grad",
            "prompts",
        ]  # the request at the caller, the answer at the server; readers hash what they read
        assert answer.header["digest"] == request.digest()

    run(model, work)


@pytest.mark.parametrize("wrong", ["signature", "sender", "part"])
def test_a_request_that_its_peer_did_not_sign_is_not_computed(model: Path, wrong: str) -> None:
    async def work(field: Field, server: Server) -> None:
        host = field.client.host
        stream = await stream_to(field, server)
        channel = MessageChannel(stream, host.identity)
        good = backward_of(field).to_message()
        message = Message(good.kind, {**good.header, "nonce": bytes(16)}, good.parts)
        sender = server.peer if wrong == "sender" else field.client.peer
        header = encode_header(message, sender, server.peer)
        signature = sign(host.identity, header, good.parts if wrong != "part" else good.parts[:1])
        if wrong == "signature":
            signature = bytes(64)
        channel.send(replace(message, header_bytes=header, signature=signature))
        await until(lambda: stream.error is not None)
        await until(lambda: server.service.bytes_reserved == 0 and not server.service._streams)
        assert server.device.jobs == []

    run(model, work)


@pytest.mark.parametrize(
    ("where", "limit", "value", "code"),
    [
        (call_service, "CALLS_PER_PEER", 1, "busy"),
        (call_service, "CALLS_BYTES", 0, "busy"),
        (calls, "CALL_BYTES_MAX", 1_000, "too-large"),
    ],
)
def test_what_is_over_a_bound_is_refused_at_once_while_others_are_computed(
    model: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType, limit: str, value: int, code: str
) -> None:
    async def work(field: Field, server: Server) -> None:
        def ask(call: bytes) -> Awaitable[object]:
            return call_remote(field.client.host, server.peer, server.record.addresses, backward_of(field, call))

        server.device.is_open = False
        running = asyncio.ensure_future(ask(b"1" * 16))
        await until(lambda: bool(server.device.held))
        reserved = server.service.bytes_reserved
        monkeypatch.setattr(where, limit, value)
        with pytest.raises(CallFault) as caught:
            await ask(b"2" * 16)
        assert caught.value.code == code
        assert (caught.value.retry_after_s is not None) == (code == "busy")
        await until(lambda: server.service.bytes_reserved == reserved)
        server.device.open()
        await running
        assert len(server.device.jobs) == 1

    run(model, work)
