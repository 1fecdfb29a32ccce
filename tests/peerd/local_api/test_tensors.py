"""Tensors over the real socket: what is refused, what is kept, and what reaches the blocks; only the blocks are a script.

The numbers that real servers answer are in tests/peerd/client/torch.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blocks.protocol.device import Batch
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from peerd.client import ApiError, Client
from peerd.client.tensor_body import Tensor, encode
from peerd.decoding import DriverModel
from peerd.local_api import limits
from peerd.local_api.node_view import BlockModel
from peerd.local_api.tape_shelf import TapeShelf
from routing.types import ComputeClass, ModelId, Span
from tests.peerd.scripted import ScriptedNode, Unserved, answering

WIDTH, BLOCKS, CONTEXT = 4, 6, 32
FORWARD, BACKWARD = "/api/v0/forward", "/api/v0/backward"


@dataclass
class HalfTape:
    batch: Batch

    @property
    def size_bytes(self) -> int:
        return self.batch.hidden.size_bytes


@dataclass
class Halves:
    hidden: Part
    prompts: Part | None


@dataclass
class HalvingBlocks:
    """`BatchCaller` whose blocks halve: the output is half the input, the gradient half the gradient."""

    asked: list[tuple[str, Span, Batch]] = field(default_factory=list)
    error: PeerdError | None = None
    hangs: bool = False
    cancelled: int = 0

    async def forward(
        self, model: DriverModel, span: Span, batch: Batch, *, keep_tape: bool = False, wait_s: float = 60.0
    ) -> tuple[Part, HalfTape | None]:
        await self._note("forward", span, batch)
        return half(batch.hidden), HalfTape(batch) if keep_tape else None

    async def backward(
        self, model: DriverModel, span: Span, tape: HalfTape, grad: Part, *, wait_s: float = 60.0
    ) -> Halves:
        await self._note("backward", span, tape.batch)
        return Halves(half(grad), None if tape.batch.prompts is None else half(tape.batch.prompts))

    def tape_of(self, span: Span, batch: Batch) -> HalfTape:
        return HalfTape(batch)

    async def _note(self, kind: str, span: Span, batch: Batch) -> None:
        self.asked.append((kind, span, batch))
        if self.error is not None:
            raise self.error
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1


def half(part: Part) -> Part:
    return Part("hidden", part.dtype, part.shape, (np.frombuffer(part.data, np.float32) / 2).tobytes())


class TensorNode(ScriptedNode):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.calls = HalvingBlocks()
        self.dtype = "float32"

    async def block_model(self, name: str | None) -> BlockModel:
        model = await self.open_model(name)
        driver = DriverModel("key", ModelId(bytes(32)), ComputeClass("none", self.dtype), WIDTH, CONTEXT)
        return BlockModel(model.name, BLOCKS, '{"model_type": "llama"}', driver)

    async def outside_tensors(self, name: str | None) -> dict[str, Tensor]:
        return {"norm": f32(np.ones(WIDTH))}


@pytest.fixture
def node() -> TensorNode:
    return TensorNode()


@pytest.fixture
def client(node: TensorNode, tmp_path: Path) -> Iterator[Client]:
    with answering(node, tmp_path / "run" / "peerd.sock") as path:
        yield Client(path)


def f32(values: Any) -> Tensor:
    array = np.asarray(values, np.float32)
    return Tensor("F32", array.shape, array.tobytes())


def integers(values: Any, dtype: str = "I64") -> Tensor:
    array = np.asarray(values, {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}[dtype])
    return Tensor(dtype, array.shape, array.tobytes())


def numbers(tensor: Tensor) -> Any:
    return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)


HIDDEN = np.arange(2 * 3 * WIDTH, dtype=np.float32).reshape(2, 3, WIDTH)
MASK = [[1, 1, 0], [1, 1, 1]]


def test_hidden_states_go_through_the_blocks_that_are_asked_for(client: Client, node: TensorNode) -> None:
    given = {"hidden": f32(HIDDEN), "attention_mask": integers(MASK), "position_ids": integers([[0, 1, 2]] * 2)}
    given["prompts"] = f32(np.ones((2, 3, WIDTH)))
    answer, settings = client.tensors(FORWARD, given, {"model": "demo", "start": "1", "end": "3"})
    assert (numbers(answer["hidden"]) == HIDDEN / 2).all()
    assert settings == {}
    (kind, span, batch), *_ = node.calls.asked
    assert (kind, span) == ("forward", Span(1, 3))
    assert batch.mask is not None and bytes(batch.mask.data) == bytes([1, 1, 0, 1, 1, 1])
    assert (batch.mask.dtype, batch.mask.shape) == ("uint8", (2, 3))
    assert batch.positions is not None and batch.positions.dtype == "int32"
    assert np.frombuffer(batch.positions.data, np.int32).tolist() == [0, 1, 2] * 2
    assert batch.prompts is not None and batch.prompts.shape == (2, 3, WIDTH)


def test_without_a_span_all_blocks_are_meant(client: Client, node: TensorNode) -> None:
    client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {})
    assert node.calls.asked[0][1] == Span(0, BLOCKS)


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I32", "I64"])
def test_a_mask_may_come_in_any_integer_type(client: Client, node: TensorNode, dtype: str) -> None:
    client.tensors(FORWARD, {"hidden": f32(HIDDEN), "attention_mask": integers(MASK, dtype)}, {})
    mask = node.calls.asked[0][2].mask
    assert mask is not None and bytes(mask.data) == bytes([1, 1, 0, 1, 1, 1])


def test_a_kept_tape_saves_sending_everything_again_once(client: Client, node: TensorNode) -> None:
    _, settings = client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"tape": "keep"})
    answer, _ = client.tensors(BACKWARD, {"grad": f32(HIDDEN)}, {"tape": settings["tape"]})
    assert (numbers(answer["hidden"]) == HIDDEN / 2).all()
    assert [kind for kind, *_ in node.calls.asked] == ["forward", "backward"]
    with pytest.raises(ApiError, match="gone by now") as caught:
        client.tensors(BACKWARD, {"grad": f32(HIDDEN)}, {"tape": settings["tape"]})
    assert (caught.value.http_status, caught.value.code) == (410, "tape-gone")


def test_a_backward_that_fails_may_be_tried_again_with_its_tape(client: Client, node: TensorNode) -> None:
    _, settings = client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"tape": "keep"})
    node.calls.error = Unserved("Nobody serves blocks 4:6 of demo.")
    with pytest.raises(ApiError, match="blocks 4:6") as caught:
        client.tensors(BACKWARD, {"grad": f32(HIDDEN)}, {"tape": settings["tape"]})
    assert (caught.value.http_status, caught.value.exit_code) == (503, 50)
    node.calls.error = None
    client.tensors(BACKWARD, {"grad": f32(HIDDEN)}, {"tape": settings["tape"]})


def test_backward_without_a_tape_takes_what_forward_took(client: Client, node: TensorNode) -> None:
    given = {"grad": f32(HIDDEN), "hidden": f32(HIDDEN), "prompts": f32(np.ones((1, 2, WIDTH)))}
    answer, _ = client.tensors(BACKWARD, given, {"start": "2", "end": "3"})
    assert (numbers(answer["hidden"]) == HIDDEN / 2).all()
    assert (numbers(answer["prompts"]) == 0.5).all()
    kind, span, _ = node.calls.asked[-1]
    assert (kind, span) == ("backward", Span(2, 3))


def test_a_large_batch_is_answered_in_pieces(client: Client) -> None:
    hidden = np.ones((20_000, 16, WIDTH), np.float32)
    answer, _ = client.tensors(FORWARD, {"hidden": f32(hidden)}, {})
    assert len(answer["hidden"].data) > 1 << 20
    assert (numbers(answer["hidden"]) == 0.5).all()


def test_what_a_model_is_and_what_lies_outside_its_blocks_are_told(client: Client) -> None:
    told = client.call("GET", "/api/v0/models/demo")
    assert (told["blocks"], told["width"], told["dtype"], told["max_positions"]) == (BLOCKS, WIDTH, "float32", CONTEXT)
    assert told["config"] == {"model_type": "llama"}
    answer, _ = client.tensors("/api/v0/models/demo/tensors", {}, {})
    assert numbers(answer["norm"]).tolist() == [1.0] * WIDTH
    with pytest.raises(ApiError, match="No model is called 'x'"):
        client.call("GET", "/api/v0/models/x")


def test_a_hub_s_name_is_one_part_of_a_path(client: Client, node: TensorNode) -> None:
    node.names = ("org/other",)
    assert client.call("GET", "/api/v0/models/org%2Fother")["name"] == "org/other"


def nan(shape: tuple[int, ...], value: float = np.nan) -> Tensor:
    values = np.zeros(shape, np.float32)
    values[-1, -1, -1] = value
    return f32(values)


BAD: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
    ({}, {}, "tensor hidden is missing"),
    ({"hiden": f32(HIDDEN)}, {}, "did you mean hidden"),
    ({"hidden": f32(HIDDEN), "grad": f32(HIDDEN)}, {}, "no tensor 'grad' here"),
    ({"hidden": f32(HIDDEN)}, {"strat": "1"}, "did you mean start"),
    ({"hidden": f32(HIDDEN)}, {"start": "-1"}, "start must be a whole number"),
    ({"hidden": f32(HIDDEN)}, {"end": "two"}, "end must be a whole number"),
    ({"hidden": f32(HIDDEN)}, {"end": "9" * 5000}, "end must be a whole number"),
    ({"hidden": f32(HIDDEN)}, {"start": "2", "end": "2"}, "2:2 is no span of demo, which has blocks 0:6"),
    ({"hidden": f32(HIDDEN)}, {"start": "3", "end": "2"}, "3:2 is no span"),
    ({"hidden": f32(HIDDEN)}, {"end": "7"}, "0:7 is no span"),
    ({"hidden": f32(HIDDEN)}, {"tape": "please"}, 'tape is "keep"'),
    ({"hidden": f32(HIDDEN)}, {"timeout": "soon"}, "timeout must be a number"),
    ({"hidden": f32(HIDDEN)}, {"timeout": "nan"}, "timeout must be a number"),
    ({"hidden": f32(HIDDEN)}, {"model": "m" * 600}, "model may have at most"),
    ({"hidden": f32(HIDDEN[0])}, {}, r"shape \(3, 4\); demo takes \(rows, tokens, 4\)"),
    ({"hidden": f32(HIDDEN[:, :, :3])}, {}, r"shape \(2, 3, 3\)"),
    ({"hidden": f32(HIDDEN[:0])}, {}, "none of them 0"),
    ({"hidden": f32(HIDDEN[:, :0])}, {}, "none of them 0"),
    ({"hidden": f32(np.zeros((1, CONTEXT + 1, WIDTH)))}, {}, "33 tokens a row; the context of demo is 32"),
    (
        {"hidden": Tensor("F16", (1, 1, WIDTH), bytes(2 * WIDTH))},
        {},
        "hidden is float16; the model computes in float32",
    ),
    ({"hidden": integers([[[1, 2, 3, 4]]])}, {}, "hidden is I64"),
    ({"hidden": nan((2, 3, WIDTH))}, {}, "hidden has values that are infinite or not a number"),
    ({"hidden": nan((2, 3, WIDTH), -np.inf)}, {}, "hidden has values that are infinite"),
    ({"hidden": nan((200_000, 3, WIDTH))}, {}, "hidden has values that are infinite"),
    ({"hidden": f32(HIDDEN), "attention_mask": integers([[1, 1, 1]])}, {}, r"shape \(1, 3\); hidden wants \(2, 3\)"),
    ({"hidden": f32(HIDDEN), "attention_mask": integers([[1, 1, 2]] * 2)}, {}, "must be 1 where there is a token"),
    ({"hidden": f32(HIDDEN), "attention_mask": f32(MASK)}, {}, "attention_mask has the type F32"),
    ({"hidden": f32(HIDDEN), "position_ids": integers([[0, 1, CONTEXT]] * 2)}, {}, "between 0 and 31"),
    ({"hidden": f32(HIDDEN), "position_ids": integers([[0, -1, 1]] * 2)}, {}, "between 0 and 31"),
    ({"hidden": f32(HIDDEN), "position_ids": integers([[0, 1, 1]] * 2, "U8")}, {}, "position_ids has the type U8"),
    ({"hidden": f32(HIDDEN), "prompts": f32(np.ones((1, 3, WIDTH)))}, {}, r"it is \(6, length, 4\)"),
    ({"hidden": f32(HIDDEN), "prompts": f32(np.ones((6, 4, WIDTH)))}, {}, "from 1 to the 3 tokens"),
    ({"hidden": f32(HIDDEN), "prompts": f32(np.ones((6, 0, WIDTH)))}, {}, "from 1 to the 3 tokens"),
    ({"hidden": f32(HIDDEN), "prompts": nan((6, 2, WIDTH))}, {}, "prompts has values"),
]


@pytest.mark.parametrize(("tensors", "settings", "words"), BAD, ids=[words for *_, words in BAD])
def test_a_bad_forward_is_one_sentence_and_nothing_is_sent(
    client: Client, node: TensorNode, tensors: dict[str, Tensor], settings: dict[str, str], words: str
) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        client.tensors(FORWARD, tensors, settings)
    assert (caught.value.http_status, caught.value.code) == (400, "invalid-request")
    assert node.calls.asked == []
    assert client.status()["state"] == "online"


BAD_BACKWARD: list[tuple[dict[str, Tensor], dict[str, str], int, str]] = [
    ({"hidden": f32(HIDDEN)}, {}, 400, "tensor grad is missing"),
    ({"grad": f32(HIDDEN)}, {}, 400, "tensor hidden is missing"),
    ({"grad": f32(HIDDEN), "hidden": f32(HIDDEN)}, {"tape": "00"}, 400, "only grad is sent"),
    ({"grad": f32(HIDDEN)}, {"tape": "never"}, 410, "gone by now"),
    ({"grad": f32(HIDDEN[:1]), "hidden": f32(HIDDEN)}, {}, 400, r"shape \(1, 3, 4\); its output has \(2, 3, 4\)"),
    ({"grad": nan((2, 3, WIDTH)), "hidden": f32(HIDDEN)}, {}, 400, "grad has values"),
]


@pytest.mark.parametrize(("tensors", "settings", "status", "words"), BAD_BACKWARD)
def test_a_bad_backward_is_one_sentence(
    client: Client, tensors: dict[str, Tensor], settings: dict[str, str], status: int, words: str
) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        client.tensors(BACKWARD, tensors, settings)
    assert caught.value.http_status == status


def test_a_gradient_that_does_not_fit_leaves_the_tape(client: Client) -> None:
    _, settings = client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"tape": "keep"})
    with pytest.raises(ApiError, match="its output has"):
        client.tensors(BACKWARD, {"grad": f32(HIDDEN[:1])}, {"tape": settings["tape"]})
    client.tensors(BACKWARD, {"grad": f32(HIDDEN)}, {"tape": settings["tape"]})


@pytest.mark.parametrize("value", [0x7F80, 0xFF80, 0x7FC0, 0x3F80])
def test_bfloat16_is_checked_for_what_is_no_number_too(client: Client, node: TensorNode, value: int) -> None:
    node.dtype = "bfloat16"
    hidden = Tensor("BF16", (1, 1, WIDTH), np.array([0, 0, 0, value], np.uint16).tobytes())
    if value == 0x3F80:
        node.calls.error = Unserved("sent")  # the script computes in float32 only
    with pytest.raises(ApiError, match="sent" if value == 0x3F80 else "not a number"):
        client.tensors(FORWARD, {"hidden": hidden}, {})


def test_an_unknown_model_is_404(client: Client) -> None:
    with pytest.raises(ApiError, match="No model is called 'x'") as caught:
        client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"model": "x"})
    assert caught.value.http_status == 404


def test_a_model_that_is_not_known_yet_is_waited_for(client: Client, node: TensorNode) -> None:
    node.pending_opens = 1
    client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {})
    node.pending_opens = 1
    with pytest.raises(ApiError, match="No model is known yet"):
        client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"timeout": "0"})


def raw(client: Client, head: str, body: bytes = b"") -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(client.socket_path)
        connection.sendall(f"POST {FORWARD} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n\r\n".encode() + body)
        received = b""
        while not received.endswith(b"}}") and (piece := connection.recv(65536)):
            received += piece
    return received


def test_junk_is_400_and_names_what_is_wrong(client: Client) -> None:
    answer = raw(client, "Content-Length: 5", b"hello")
    assert b" 400 " in answer.splitlines()[0]
    assert b"not safetensors: its header is cut off" in answer


def test_a_body_without_a_length_is_refused(client: Client) -> None:
    answer = raw(client, "Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert b"Content-Length" in answer


def test_a_body_over_the_limit_is_refused_before_it_is_read(client: Client) -> None:
    answer = raw(client, f"Content-Length: {limits.TENSOR_BODY_BYTES_MAX + 1}")
    assert b" 413 " in answer.splitlines()[0]
    assert b"send fewer rows" in answer


def test_bodies_under_way_are_bounded_together(
    client: Client, node: TensorNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peerd.local_api.tensor_bodies.TENSOR_BODIES_BYTES_MAX", 100)
    answer = raw(client, "Content-Length: 101", bytes(101))
    assert b" 503 " in answer.splitlines()[0]
    assert b"Retry-After: 1" in answer
    assert b'"busy"' in answer


def test_requests_under_way_are_bounded(client: Client, node: TensorNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peerd.local_api.tensors.TENSOR_REQUESTS_MAX", 0)
    with pytest.raises(ApiError, match="under way") as caught:
        client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {})
    assert caught.value.http_status == 429


def hanging(
    client: Client,
    path: str = FORWARD,
    tensors: dict[str, Tensor] | None = None,
    settings: dict[str, str] | None = None,
) -> socket.socket:
    """A call under way, whose connection is returned."""
    pieces = encode(tensors or {"hidden": f32(HIDDEN)}, settings or {})
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(client.socket_path)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {sum(map(len, pieces))}\r\n\r\n"
    connection.sendall(head.encode() + b"".join(pieces))
    return connection


def wait(node: TensorNode, condition: Any) -> None:
    """Until the daemon's thread has come so far; every status asks its loop once."""
    for _ in range(2000):
        if condition():
            return
        node.wait_until(condition, 0.005)
    raise AssertionError("it did not happen in time")


def test_hanging_up_cancels_the_call(client: Client, node: TensorNode) -> None:
    node.calls.hangs = True
    connection = hanging(client)
    wait(node, lambda: node.calls.asked)
    connection.close()
    wait(node, lambda: node.calls.cancelled)


def test_a_tape_that_was_in_use_when_the_others_expired_expires_too(
    node: TensorNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShortShelf(TapeShelf):
        looked = 0

        def __init__(self) -> None:
            super().__init__(life_s=0.05)
            shelves.append(self)

        def expire(self, now: float) -> None:
            self.looked += 1
            super().expire(now)

    shelves: list[ShortShelf] = []
    monkeypatch.setattr("peerd.local_api.tensors.TapeShelf", ShortShelf)
    with answering(node, tmp_path / "run" / "s") as path:
        [shelf] = shelves
        client = Client(path)
        _, settings = client.tensors(FORWARD, {"hidden": f32(HIDDEN)}, {"tape": "keep"})
        node.calls.hangs = True
        connection = hanging(client, BACKWARD, {"grad": f32(HIDDEN)}, settings)
        wait(node, lambda: node.calls.asked[-1][0] == "backward")
        looked = shelf.looked
        wait(node, lambda: shelf.looked > looked)
        assert len(shelf) == 1  # in use
        connection.close()
        wait(node, lambda: node.calls.cancelled)
        wait(node, lambda: len(shelf) == 0)


def test_stopping_the_daemon_ends_calls_with_a_reason(node: TensorNode, tmp_path: Path) -> None:
    node.calls.hangs = True
    with answering(node, tmp_path / "run" / "s") as path:
        connection = hanging(Client(path))
        wait(node, lambda: node.calls.asked)
    with connection:
        assert b"is stopping" in connection.recv(65536)
    assert node.calls.cancelled == 1
