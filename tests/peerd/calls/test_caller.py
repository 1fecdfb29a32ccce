"""Batches through servers that overlap, vanish, are full, lie or fall silent: the same bits, and blame where it belongs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from blocks import call_service
from blocks.call_service import TENSORS_PROTOCOL
from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import CallRequest
from blocks.protocol.device import BackwardJob, Batch
from overlay.errors import PeerdError
from overlay.rpc.channel import MessageChannel
from overlay.rpc.types import Message, Part
from overlay.stream import Stream
from peerd.calls import caller as caller_module
from peerd.calls import remote
from peerd.calls.caller import Gradients
from peerd.calls.quiet import QUIET_S
from peerd.calls.remote import call_remote
from routing.types import ModelId, Span
from tests.models import make_tiny
from tests.peerd.calls.field import Field, Server, data
from tests.ring import CLASS, until

BLOCKS = 4
WHOLE = Span(0, BLOCKS)
REQUEST = CallRequest(
    calls.FORWARD,
    b"c" * 16,
    ModelId(bytes(32)),
    str(CLASS),
    WHOLE,
    Batch(Part("hidden", "float32", (1, 1, 1), bytes(4))),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")
    return directory


def run(model: Path, work: Callable[[Field], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), Field(model, BLOCKS) as field:
            await work(field)

    asyncio.run(main())


async def step(field: Field, batch: Batch) -> tuple[Part, Gradients]:
    output, tape = await field.caller.forward(field.model, WHOLE, batch, keep_tape=True)
    assert tape is not None
    return output, await field.caller.backward(field.model, WHOLE, tape, field.grad(batch))


async def expected(model: Path, batch: Batch) -> tuple[bytes, bytes, bytes]:
    """What one server of everything gives."""
    async with Field(model, BLOCKS) as alone:
        await alone.server(0, BLOCKS)
        output, gradients = await step(alone, batch)
        return data(output), data(gradients.hidden), data(gradients.prompts)


@pytest.mark.parametrize(
    "spans",
    [[(0, 2), (2, 4)], [(0, 3), (1, 4), (2, 3)], [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 4), (0, 2), (2, 4)]],
    ids=str,
)
def test_the_bits_are_the_same_however_blocks_are_spread(
    model: Path, spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "MICRO_BATCH_TOKENS", 14)  # two rows a micro-batch

    async def work(field: Field) -> None:
        batch = field.batch(prompts=BLOCKS)
        for span in spans:
            await field.server(*span)
        output, gradients = await step(field, batch)
        assert (data(output), data(gradients.hidden), data(gradients.prompts)) == await expected(model, batch)
        assert any(data(output)) and any(data(gradients.hidden)) and any(data(gradients.prompts))
        assert sum(bool(server.device.jobs) for server in field.servers) >= 2
        assert field.swarm.blamed == []

    run(model, work)


def test_a_server_lost_between_forward_and_backward_costs_a_recomputation_and_no_bit(model: Path) -> None:
    async def work(field: Field) -> None:
        batch = field.batch(prompts=BLOCKS)
        whole = await field.server(0, 4)
        output, tape = await field.caller.forward(field.model, WHOLE, batch, keep_tape=True)
        assert tape is not None
        assert [section.peer for section in tape.micros[0].sections] == [whole.peer]
        halves = [await field.server(0, 2), await field.server(2, 4)]
        whole.vanish()
        gradients = await field.caller.backward(field.model, WHOLE, tape, field.grad(batch))
        assert (data(output), data(gradients.hidden), data(gradients.prompts)) == await expected(model, batch)
        assert field.caller.servers_lost >= 1
        kinds = [[type(job).__name__ for job in half.device.jobs] for half in halves]
        assert kinds == [["ForwardJob", "BackwardJob"], ["ForwardJob", "BackwardJob"]]

    run(model, work)


@pytest.mark.parametrize("kind", ["ForwardJob", "BackwardJob"])
def test_a_server_lost_in_the_middle_of_a_call_costs_no_bit(model: Path, kind: str) -> None:
    async def work(field: Field) -> None:
        batch = field.batch(prompts=BLOCKS)
        dying = await field.server(0, 4)
        spare = await field.server(0, 4, listed=False)

        def die(job: object) -> None:
            if type(job).__name__ == kind:
                dying.device.is_open = False
                field.swarm.records.append(spare.record)
                asyncio.get_running_loop().call_soon(dying.vanish)

        dying.device.on_job = die
        output, gradients = await step(field, batch)
        assert (data(output), data(gradients.hidden), data(gradients.prompts)) == await expected(model, batch)
        assert [peer for peer, _ in field.swarm.blamed] == [dying.peer]
        assert any(isinstance(job, BackwardJob) for job in spare.device.jobs)

    run(model, work)


def test_a_full_server_is_left_alone_for_a_moment_and_blamed_for_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(field: Field) -> None:
        batch = field.batch()
        full = await field.server(0, 4)
        full.service._streams[field.client.peer] = call_service.CALLS_PER_PEER
        calling = asyncio.ensure_future(field.caller.forward(field.model, WHOLE, batch))
        await until(lambda: bool(field.client.host.connections()))
        full.service._streams.clear()
        output, _ = await calling
        assert any(data(output))
        assert field.swarm.blamed == []

    run(model, work)


def request_for(field: Field, batch: Batch, call: bytes = b"c" * 16) -> CallRequest:
    return CallRequest(calls.FORWARD, call, field.model.model, str(CLASS), WHOLE, batch)


def test_a_copy_over_the_wire_is_answered_and_not_computed(model: Path) -> None:
    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        request = request_for(field, field.batch())
        server.device.is_open = False

        async def ask() -> Message:
            return await call_remote(field.client.host, server.peer, server.record.addresses, request)

        asked = [asyncio.ensure_future(ask()) for _ in range(2)]
        await until(lambda: len(server.service._streams) == 1 and server.service._streams[field.client.peer] == 2)
        await until(lambda: bool(server.device.held))
        server.device.open()
        answers = [await one for one in asked] + [await ask()]
        assert len({data(answer.parts[0]) for answer in answers}) == 1
        assert len(server.device.jobs) == 1
        other = request_for(field, field.batch(seed=1))
        with pytest.raises(CallFault, match="Another call"):
            await call_remote(field.client.host, server.peer, server.record.addresses, other)
        await until(lambda: server.service.bytes_reserved == 0)

    run(model, work)


def test_a_cancelled_call_frees_its_server_and_leaves_what_has_not_begun(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blocks.call_service.pieces_of", lambda rows, tokens: [(n, n + 1) for n in range(rows)])

    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        server.device.is_open = False
        calling = asyncio.ensure_future(field.caller.forward(field.model, WHOLE, field.batch()))
        await until(lambda: len(server.device.held) == call_service.DEVICE_PIECES)
        calling.cancel()
        await asyncio.wait([calling])
        await until(lambda: server.service.bytes_reserved == 0)
        server.device.open()
        await until(lambda: server.service._on_device == 0)
        assert len(server.device.jobs) == call_service.DEVICE_PIECES

    run(model, work)


async def lie(server: Server, answer: Callable[[Message], Message]) -> None:
    """Let ``server`` answer what it likes."""
    host = server.node.host
    host.unserve(TENSORS_PROTOCOL)

    async def serve(stream: Stream) -> None:
        channel = MessageChannel(stream, host.identity)
        request = await channel.receive()
        fresh = answer(request)
        header = {"nonce": request.header["nonce"], "call": request.header["call"], **fresh.header}
        await channel.send_and_drain(Message(fresh.kind, header, fresh.parts), end=True)
        channel.close()

    host.serve(TENSORS_PROTOCOL, serve)


@pytest.mark.parametrize("what", ["shape", "digest", "kind", "nonce"])
def test_a_server_that_answers_something_else_is_blamed_and_passed_over(model: Path, what: str) -> None:
    async def work(field: Field) -> None:
        batch = field.batch()
        liar = await field.server(0, 4)
        honest = await field.server(0, 4, listed=False)

        def answer(message: Message) -> Message:
            field.swarm.records.append(honest.record)
            request = calls.decode_call(message)
            hidden = request.batch.hidden
            if what == "shape":
                hidden = Part("hidden", "float32", (1, 1, 1), bytes(4))
            digest = bytes(32) if what == "digest" else request.digest()
            kind = calls.GRADIENTS if what == "kind" else calls.OUTPUT
            header = {"digest": digest} | ({"nonce": bytes(16)} if what == "nonce" else {})
            return Message(kind, header, (hidden,))

        await lie(liar, answer)
        output, _ = await field.caller.forward(field.model, WHOLE, batch)
        assert any(data(output))
        assert field.swarm.blamed == [(liar.peer, "protocol-violation")]
        assert honest.device.jobs

    run(model, work)


def test_a_server_that_takes_a_call_and_says_nothing_is_lost(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WORD_S", 0.2)
    monkeypatch.setattr(remote, "LOOK_S", 0.05)

    async def work(field: Field) -> None:
        frozen = await field.server(0, 4)
        spare = await field.server(0, 4, listed=False)
        frozen.node.host.unserve(TENSORS_PROTOCOL)
        asked = asyncio.Event()

        async def hang(stream: Stream) -> None:
            field.swarm.records.append(spare.record)
            asked.set()
            await asyncio.Event().wait()

        frozen.node.host.serve(TENSORS_PROTOCOL, hang)
        output, _ = await field.caller.forward(field.model, WHOLE, field.batch())
        assert asked.is_set() and any(data(output))
        assert field.swarm.blamed == [(frozen.peer, "silent")]

    run(model, work)


def fall_silent(server: Server, asked: list[bytes]) -> None:
    """Let ``server`` take calls, and say nothing."""

    async def hang(stream: Stream) -> None:
        asked.append(server.peer)
        await asyncio.Event().wait()

    server.node.host.unserve(TENSORS_PROTOCOL)
    server.node.host.serve(TENSORS_PROTOCOL, hang)


def test_of_two_servers_that_fall_silent_at_once_neither_is_asked_what_the_other_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr(caller_module, "MICRO_BATCH_TOKENS", 7)  # a row a micro-batch
    for module in (caller_module, remote):
        monkeypatch.setattr(module, "QUIET_S", 0.3)

    async def work(field: Field) -> None:
        silent = [await field.server(0, 4) for _ in range(2)]
        spare = await field.server(0, 4)
        field.swarm.records[2] = replace(spare.record, prefill_s=10.0)
        await field.caller.forward(field.model, WHOLE, field.batch(rows=3))
        assert [len(server.device.jobs) for server in field.servers] == [1, 1, 1], "the slow one has had its share"
        asked: list[bytes] = []
        for server in silent:
            fall_silent(server, asked)
        batch = field.batch(rows=2, seed=1)
        output, _ = await field.caller.forward(field.model, WHOLE, batch)
        assert sorted(asked) == sorted(server.peer for server in silent), "each was asked once"
        assert sorted(field.swarm.blamed) == sorted((server.peer, "silent") for server in silent)
        async with Field(model, BLOCKS) as alone:
            await alone.server(0, BLOCKS)
            assert data(output) == data((await alone.caller.forward(alone.model, WHOLE, batch))[0])

    run(model, work)


def test_a_quiet_server_is_asked_all_the_same_where_there_is_no_other(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "MICRO_BATCH_TOKENS", 7)
    for module in (caller_module, remote):
        monkeypatch.setattr(module, "QUIET_S", -1.0)

    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        output, _ = await field.caller.forward(field.model, WHOLE, field.batch(rows=3))
        assert any(data(output)) and field.swarm.blamed == []
        assert len(server.device.jobs) == 3

    run(model, work)


def test_the_first_word_is_due_later_by_what_is_queued_before_it_and_each_after_the_last() -> None:
    async def main() -> None:
        ears = remote._Ears(REQUEST, b"n", 100.0)
        assert ears.word_due_s(101.0, 0) == QUIET_S - 1
        assert ears.word_due_s(101.0, 2 * remote.UPLOAD_BYTES_PER_S) == QUIET_S + 1
        ears.heard, ears.heard_at = True, 102.0
        assert ears.word_due_s(102.5, 2 * remote.UPLOAD_BYTES_PER_S) == QUIET_S - 0.5

    asyncio.run(main())


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FIRST_WORD_S", 0.8), ("CALL_SILENCE_S", 0.8), ("CALL_STALL_S", 0.8), ("LOOK_S", 0.02)):
        monkeypatch.setattr(remote, name, seconds)
    monkeypatch.setattr(call_service, "PROGRESS_S", 0.02)


def test_a_call_that_waits_its_turn_is_not_lost(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        server.service._on_device = call_service.DEVICE_PIECES  # others' pieces have the device
        calling = asyncio.ensure_future(field.caller.forward(field.model, WHOLE, field.batch()))
        done, _ = await asyncio.wait([calling], timeout=2.0)
        assert not done and server.service.bytes_reserved and not server.device.jobs
        server.service._on_device = 0
        server.service._pump()
        await calling
        assert field.swarm.blamed == []
        assert len(server.device.jobs) == 1

    run(model, work)


def answering_for_ever(field: Field, server: Server, begun: Callable[[int], object]) -> None:
    """Let ``server`` say how far it is, and nothing else."""
    host = server.node.host
    host.unserve(TENSORS_PROTOCOL)

    async def serve(stream: Stream) -> None:
        channel = MessageChannel(stream, host.identity)
        request = await channel.receive()
        header = {"nonce": request.header["nonce"], "call": request.header["call"], "of": 1}
        with contextlib.suppress(PeerdError):
            for said in itertools.count():
                await channel.send_and_drain(Message(calls.PROGRESS, {**header, "begun": begun(said)}))
                await asyncio.sleep(0.02)

    host.serve(TENSORS_PROTOCOL, serve)


def test_a_turn_that_never_comes_is_waited_for_elsewhere_and_nobody_is_blamed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    monkeypatch.setattr(remote, "CALL_TURN_S", 0.3)

    async def work(field: Field) -> None:
        crowded, spare = await field.server(0, 4), await field.server(0, 4)
        field.swarm.records[0] = replace(crowded.record, prefill_s=1e-6)
        answering_for_ever(field, crowded, lambda said: 0)
        for _ in range(2):
            output, _ = await field.caller.forward(field.model, WHOLE, field.batch(), wait_s=0.05)
            assert any(data(output))
        assert spare.device.jobs
        assert field.swarm.blamed == [] and field.caller.servers_lost == 0

    run(model, work)


def test_a_turn_that_never_comes_anywhere_ends_the_call_in_words(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)
    for name in ("AVOID_S", "BUSY_S"):
        monkeypatch.setattr(caller_module, name, 0.02)
    monkeypatch.setattr(remote, "CALL_TURN_S", 0.2)

    async def work(field: Field) -> None:
        crowded = await field.server(0, 4)
        answering_for_ever(field, crowded, lambda said: 0)
        with pytest.raises(CallFault, match="others before this call") as caught:
            await field.caller.forward(field.model, WHOLE, field.batch(), wait_s=0.1)
        assert caught.value.retryable
        assert field.swarm.blamed == []

    run(model, work)


@pytest.mark.parametrize(
    "begun", [lambda said: said, lambda said: 1 << 60, lambda said: True], ids=["more", "most", "yes"]
)
def test_a_server_that_only_says_that_it_moves_is_lost(
    model: Path, monkeypatch: pytest.MonkeyPatch, begun: Callable[[int], object]
) -> None:
    impatient(monkeypatch)

    async def work(field: Field) -> None:
        liar, spare = await field.server(0, 4), await field.server(0, 4)
        field.swarm.records[0] = replace(liar.record, prefill_s=1e-6)
        answering_for_ever(field, liar, begun)
        await field.caller.forward(field.model, WHOLE, field.batch())
        await field.caller.forward(field.model, WHOLE, field.batch())
        assert spare.device.jobs
        assert field.swarm.blamed == [(liar.peer, "stalled")]

    run(model, work)


def test_a_call_that_stands_still_once_it_began_is_taken_elsewhere(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    async def work(field: Field) -> None:
        stuck = await field.server(0, 4)
        stuck.device.is_open = False
        spare = await field.server(0, 4, listed=False)
        stuck.device.on_job = lambda job: field.swarm.records.append(spare.record)
        output, _ = await field.caller.forward(field.model, WHOLE, field.batch())
        assert any(data(output))
        assert field.swarm.blamed == [(stuck.peer, "stalled")]
        await until(lambda: stuck.service.bytes_reserved == 0)

    run(model, work)


def test_a_lost_server_leaves_a_call_its_time_to_wait_for_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)

    async def work(field: Field) -> None:
        stuck = await field.server(0, 4)
        stuck.device.is_open = False
        spare = await field.server(0, 4, listed=False)
        stuck.device.on_job = lambda job: field.swarm.records.append(spare.record)
        output, _ = await field.caller.forward(field.model, WHOLE, field.batch(), wait_s=0.05)
        assert any(data(output)) and field.caller.servers_lost == 1

    run(model, work)


def test_a_record_that_has_no_readable_address_ends_no_batch(model: Path) -> None:
    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        unreadable = replace(server.record, peer=b"\0", addresses=("nowhere",), prefill_s=0.0001)
        field.swarm.records.insert(0, unreadable)
        output, _ = await field.caller.forward(field.model, WHOLE, field.batch())
        assert any(data(output))
        assert field.swarm.blamed == [(b"\0", "failed")]

    run(model, work)


def test_a_call_without_parts_is_refused_and_holds_nothing(model: Path) -> None:
    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        good = request_for(field, field.batch())

        class Empty(CallRequest):
            def to_message(self) -> Message:
                return Message(good.kind, good.to_message().header)

        request = Empty(good.kind, good.call, good.model, good.compute_class, good.span, good.batch)
        with pytest.raises(CallFault, match="hidden is missing"):
            await call_remote(field.client.host, server.peer, server.record.addresses, request)
        await until(lambda: server.service.bytes_reserved == 0 and not server.service._streams)

    run(model, work)


def test_blocks_that_nobody_serves_are_named(model: Path) -> None:
    async def work(field: Field) -> None:
        await field.server(0, 2)
        with pytest.raises(CallFault, match="block 2"):
            await field.caller.forward(field.model, WHOLE, field.batch(), wait_s=0.1)

    run(model, work)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"span": [0, 5]}, "not-served"),
        ({"class": "none/bfloat16/sdpa/1"}, "wrong-class"),
        ({"model": bytes(32)}, "not-served"),
        ({"span": [3, 3]}, "bad-request"),
        ({"span": [0, -1]}, "bad-request"),
    ],
    ids=str,
)
def test_what_a_server_cannot_compute_is_refused_by_its_code(model: Path, change: dict[str, object], code: str) -> None:
    async def work(field: Field) -> None:
        server = await field.server(0, 4)
        good = request_for(field, field.batch())

        class Changed(CallRequest):
            def to_message(self) -> Message:
                message = good.to_message()
                return Message(message.kind, {**message.header, **change}, message.parts)

        request = Changed(good.kind, good.call, good.model, good.compute_class, good.span, good.batch)
        with pytest.raises(CallFault) as caught:
            await call_remote(field.client.host, server.peer, server.record.addresses, request)
        assert caught.value.code == code
        assert server.device.jobs == []

    run(model, work)


def test_a_row_too_long_for_a_call_is_refused_with_the_length_that_fits(model: Path) -> None:
    with pytest.raises(CallFault, match="16384 fit"):
        calls.micro_batches(1, 20000, 20000, 1024)
    assert calls.micro_batches(5, 100, 100, 200) == [(0, 2), (2, 4), (4, 5)]
