"""What tensor calls may say: good ones survive the way, and anything else is refused in words and raises nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.protocol import calls
from blocks.protocol.call_errors import CallFault
from blocks.protocol.calls import CallRequest, Offer, check_against, decode_call
from blocks.protocol.device import Batch
from overlay.rpc.types import Message, Part
from routing.types import ModelId, Span

ROWS, TOKENS, WIDTH = 2, 3, 4
OFFER = Offer("key", Span(0, 4), WIDTH, "float32", 16)


def part(name: str, dtype: str, *shape: int) -> Part:
    found = Part(name, dtype, shape, b"")
    return Part(name, dtype, shape, bytes(found.size_bytes))


HIDDEN = part("hidden", "float32", ROWS, TOKENS, WIDTH)
FULL = Batch(
    HIDDEN, part("mask", "uint8", ROWS, TOKENS), part("positions", "int32", ROWS, TOKENS), part("prompts", "float32", 2, 1, WIDTH)
)  # fmt: skip


def request(kind: str = calls.FORWARD, batch: Batch = FULL, grad: Part | None = None) -> CallRequest:
    return CallRequest(kind, b"c" * 16, ModelId(bytes(32)), "none/float32", Span(1, 3), batch, grad)


def refused(message: Message) -> CallFault:
    with pytest.raises(CallFault) as caught:
        check_against(decode_call(message), OFFER)
    return caught.value


@pytest.mark.parametrize("sent", [request(), request(batch=Batch(HIDDEN)), request(calls.BACKWARD, grad=HIDDEN)])
def test_a_call_survives_the_way_with_its_digest(sent: CallRequest) -> None:
    came = decode_call(sent.to_message())
    check_against(came, OFFER)
    assert came.digest() == sent.digest()
    assert [one.name for one in came.parts] == [one.name for one in sent.parts]


def test_every_field_that_matters_is_in_the_digest_and_the_id_is_not() -> None:
    base = request()
    others = [
        request(batch=Batch(HIDDEN)),
        request(calls.BACKWARD, grad=HIDDEN),
        CallRequest(base.kind, base.call, ModelId(b"m" * 32), base.compute_class, base.span, FULL),
        CallRequest(base.kind, base.call, base.model, "other", base.span, FULL),
        CallRequest(base.kind, base.call, base.model, base.compute_class, Span(0, 2), FULL),
    ]
    assert len({other.digest() for other in (base, *others)}) == len(others) + 1
    assert CallRequest(base.kind, b"x" * 16, base.model, base.compute_class, base.span, FULL).digest() == base.digest()


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (Batch(part("hidden", "float32", 0, TOKENS, WIDTH)), "none of them 0"),
        (Batch(part("hidden", "float32", ROWS, TOKENS)), "rows, tokens, d_model"),
        (Batch(HIDDEN, part("mask", "uint8", TOKENS, ROWS)), "mask is"),
        (Batch(HIDDEN, Part("mask", "uint8", (ROWS, TOKENS), b"\x01\x02" * 3)), "0 and 1"),
        (Batch(HIDDEN, None, part("positions", "int64", ROWS, TOKENS)), "int32"),
        (Batch(HIDDEN, None, Part("positions", "int32", (ROWS, TOKENS), b"\x10\x00\x00\x00" * 6)), "Positions"),
        (Batch(HIDDEN, None, Part("positions", "int32", (ROWS, TOKENS), b"\xff\xff\xff\xff" * 6)), "Positions"),
        (Batch(HIDDEN, None, None, part("prompts", "float32", 3, 1, WIDTH)), "prompts are"),
        (Batch(HIDDEN, None, None, part("prompts", "float32", 2, TOKENS + 1, WIDTH)), "no longer"),
        (Batch(part("hidden", "float32", ROWS, TOKENS, WIDTH + 1)), "boundary"),
        (Batch(part("hidden", "float16", ROWS, TOKENS, WIDTH)), "boundary"),
    ],
)
def test_parts_that_do_not_fit_each_other_or_the_model_are_refused(batch: Batch, words: str) -> None:
    fault = refused(request(batch=batch).to_message())
    assert fault.code == "bad-request"
    assert words in str(fault)
    assert not fault.retryable


def test_rows_beyond_the_context_and_calls_beyond_the_limit_have_their_own_codes() -> None:
    assert refused(request(batch=Batch(part("hidden", "float32", 1, 17, WIDTH))).to_message()).code == "unsupported"
    assert refused(request(batch=Batch(part("hidden", "uint8", 16385, 1, 1))).to_message()).code == "too-large"


def test_backward_has_a_gradient_and_forward_has_none() -> None:
    assert refused(request(calls.BACKWARD).to_message()).code == "bad-request"
    assert refused(request(grad=HIDDEN).to_message()).code == "bad-request"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=40) | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(
    st.dictionaries(st.sampled_from(["call", "model", "class", "span", "x"]), values),
    st.lists(
        st.builds(
            part,
            st.sampled_from(["hidden", "mask", "positions", "prompts", "grad", "x"]),
            st.sampled_from(["float32", "uint8", "int32"]),
            st.integers(0, 3), st.integers(0, 3), st.integers(0, 3),
        ),
        max_size=6,
    ),
    st.sampled_from([calls.FORWARD, calls.BACKWARD, "x"]),
)  # fmt: skip
def test_whatever_comes_is_a_call_or_a_refusal(changes: dict[str, Any], parts: list[Part], kind: str) -> None:
    message = Message(kind, {**request().to_message().header, **changes}, tuple(parts))
    with contextlib.suppress(CallFault):
        check_against(decode_call(message), OFFER)
