"""From the body of a tensor request to values: every tensor and setting checked, every refusal a sentence that names what is meant.

Pure. Owns what ``/api/v0/forward`` and ``/backward`` take (docs/training.md, section 5). Finding out whether values are finite reads
every byte, so callers do it off the loop when there are many.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blocks.protocol.device import Batch
from blocks.protocol.limits import OPEN_PROMPTS_BYTES_MAX
from overlay.rpc.types import Part
from peerd.client.tensor_body import BadTensorBody, Tensor, decode
from peerd.decoding import DriverModel
from peerd.local_api.errors import InvalidRequest
from peerd.local_api.limits import DEFAULT_WAIT_S, MODEL_NAME_CHARS_MAX, NAME_CHARS_MAX, WAIT_S_MAX
from peerd.local_api.node_view import BlockModel
from routing.types import Span

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What hidden states can be, by safetensors' names."""
ITEM_TYPES: Mapping[str, npt.DTypeLike] = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "BOOL": "u1", "I32": "<i4", "I64": "<i8",
}  # fmt: skip
BF16_EXPONENT = 0x7F80
"""All ones: infinite, or not a number."""
SCAN_ITEMS = 1 << 20
"""Looked at in one go, so that the check needs little memory of its own."""

SESSION_SETTINGS = ("model", "start", "end", "max_tokens", "timeout")
_SETTINGS = ("model", "start", "end", "tape", "timeout")
_INPUTS = ("hidden", "attention_mask", "position_ids", "prompts")


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """A request as far as it can be understood without its model.

    Attributes:
        tape: forward: ``keep`` or None; backward: the id of the tape that the gradient belongs to, or None.
    """

    tensors: Mapping[str, Tensor]
    model: str | None
    start: int
    end: int | None
    tape: str | None
    wait_s: float


def parse_forward(body: bytes | bytearray | memoryview) -> TensorRequest:
    """Read the body of ``/api/v0/forward``. Raises InvalidRequest."""
    request = _parse(body, _INPUTS)
    if request.tape not in (None, "keep"):
        raise InvalidRequest('tape is "keep", or left out.', "tape")
    _require(request, "hidden")
    return request


def parse_backward(body: bytes | bytearray | memoryview) -> TensorRequest:
    """Read the body of ``/api/v0/backward``. Raises InvalidRequest."""
    request = _parse(body, ("grad", *_INPUTS))
    _require(request, "grad")
    if request.tape is None:
        _require(request, "hidden")
    elif len(request.tensors) > 1:
        raise InvalidRequest("With a tape only grad is sent: the tape has the rest.", "tape")
    return request


def read_batch(request: TensorRequest, model: BlockModel) -> tuple[Span, Batch]:
    """What to compute: the span, and the batch with every tensor in its shape and type. Raises InvalidRequest."""
    span = _span(request, model)
    hidden = _hidden(request.tensors["hidden"], model, "hidden")
    rows, tokens, _ = hidden.shape
    if tokens > model.driver.max_positions:
        raise InvalidRequest(
            f"hidden has {tokens} tokens a row; the context of {model.name} is {model.driver.max_positions}.", "hidden"
        )
    given = request.tensors
    mask = _mask(given["attention_mask"], (rows, tokens)) if "attention_mask" in given else None
    positions = None
    if "position_ids" in given:
        positions = _positions(given["position_ids"], (rows, tokens), model.driver.max_positions)
    prompts = _prompts(given["prompts"], model, span, tokens, "tokens of hidden") if "prompts" in given else None
    return span, Batch(hidden, mask, positions, prompts)


def read_grad(request: TensorRequest, model: DriverModel, shape: tuple[int, ...]) -> Part:
    """The gradient of an output of ``shape``. Raises InvalidRequest."""
    return _floats(request.tensors["grad"], model.compute_class.dtype, shape, "grad")


def parse_session(body: bytes | bytearray | memoryview) -> tuple[dict[str, Any], Tensor]:
    """Read a body of ``/api/v0/sessions`` that brings deep prompts: its settings as JSON has them, and the prompts."""
    tensors, settings = _decoded(body)
    _check_names(tensors, ("prompts",), "tensor")
    _check_names(settings, SESSION_SETTINGS, "setting")
    if "prompts" not in tensors:
        raise InvalidRequest(
            "The tensor prompts is missing; a session without deep prompts is asked for in JSON.", "prompts"
        )
    counts = {name: _count(settings, name, 0) for name in ("start", "end", "max_tokens") if name in settings}
    fields: dict[str, Any] = {"model": settings.get("model"), "timeout": _wait(settings)}
    return fields | counts, tensors["prompts"]


def read_prompts(tensor: Tensor, model: BlockModel, span: Span, max_tokens: int) -> Part:
    """The deep prompts of a session, as bytes of its own. Raises InvalidRequest."""
    if len(tensor.data) > OPEN_PROMPTS_BYTES_MAX:
        raise InvalidRequest(
            f"prompts has {len(tensor.data) >> 20} MiB, and servers take {OPEN_PROMPTS_BYTES_MAX >> 20}; use shorter ones.",
            "prompts",
        )
    part = _prompts(tensor, model, span, max_tokens, "tokens of the session")
    return Part(part.name, part.dtype, part.shape, bytes(part.data))


@dataclass(frozen=True, slots=True)
class StepRequest:
    """New hidden states for a session; ``want`` is ``all`` or ``last``."""

    hidden: Tensor
    position: int
    want: str


def parse_step(body: bytes | bytearray | memoryview) -> StepRequest:
    """Read the body of ``/api/v0/sessions/ID/step``. Raises InvalidRequest."""
    tensors, settings = _decoded(body)
    _check_names(tensors, ("hidden",), "tensor")
    _check_names(settings, ("position", "want"), "setting")
    if "hidden" not in tensors:
        raise InvalidRequest("The tensor hidden is missing.", "hidden")
    position, want = _count(settings, "position", -1), settings.get("want", "all")
    if position < 0:
        raise InvalidRequest("position is missing: the place of the first of the new states.", "position")
    if want not in ("all", "last"):
        raise InvalidRequest('want is "all" or "last".', "want")
    return StepRequest(tensors["hidden"], position, want)


def read_states(request: StepRequest, model: DriverModel) -> Part:
    """The states of a step, (tokens, d_model). Raises InvalidRequest."""
    tensor = request.hidden
    if len(tensor.shape) != 3 or tensor.shape[0] != 1 or not tensor.shape[1] or tensor.shape[2] != model.width:
        raise InvalidRequest(
            f"hidden has the shape {_shape(tensor)}; a step takes (1, tokens, {model.width}) with at least one token.",
            "hidden",
        )
    part = _floats(tensor, model.compute_class.dtype, tensor.shape, "hidden")
    return Part(part.name, part.dtype, part.shape[1:], part.data)


def _decoded(body: bytes | bytearray | memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return decode(body)
    except BadTensorBody as error:
        raise InvalidRequest(f"The request's body is not safetensors: {error}.") from error


def _parse(body: bytes | bytearray | memoryview, known: tuple[str, ...]) -> TensorRequest:
    tensors, settings = _decoded(body)
    _check_names(tensors, known, "tensor")
    _check_names(settings, _SETTINGS, "setting")
    model = settings.get("model", "")
    if len(model) > MODEL_NAME_CHARS_MAX:
        raise InvalidRequest(f"model may have at most {MODEL_NAME_CHARS_MAX} characters.", "model")
    end = _count(settings, "end", -1)
    return TensorRequest(
        tensors,
        model or None,
        _count(settings, "start", 0),
        None if end < 0 else end,
        settings.get("tape"),
        _wait(settings),
    )


def _check_names(given: Mapping[str, Any], known: tuple[str, ...], kind: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name[:NAME_CHARS_MAX], known, 1)
            advice = f"did you mean {close[0]}?" if close else f"there is: {', '.join(known)}."
            raise InvalidRequest(f"There is no {kind} {name[:NAME_CHARS_MAX]!r} here; {advice}", name[:NAME_CHARS_MAX])


def _count(settings: Mapping[str, str], name: str, default: int) -> int:
    text = settings.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidRequest(f"{name} must be a whole number, in decimal digits.", name)
    return int(text)


def _wait(settings: Mapping[str, str]) -> float:
    try:
        wait_s = float(settings.get("timeout", DEFAULT_WAIT_S))
    except ValueError:
        wait_s = math.nan
    if not 0.0 <= wait_s <= WAIT_S_MAX:
        raise InvalidRequest(f"timeout must be a number of seconds from 0 to {WAIT_S_MAX:g}.", "timeout")
    return wait_s


def _require(request: TensorRequest, name: str) -> None:
    if name not in request.tensors:
        raise InvalidRequest(f"The tensor {name} is missing.", name)


def _span(request: TensorRequest, model: BlockModel) -> Span:
    end = model.blocks if request.end is None else request.end
    if not request.start < end <= model.blocks:
        raise InvalidRequest(
            f"{request.start}:{end} is no span of {model.name}, which has blocks 0:{model.blocks}.", "start"
        )
    return Span(request.start, end)


def _hidden(tensor: Tensor, model: BlockModel, name: str) -> Part:
    width = model.driver.width
    if len(tensor.shape) != 3 or tensor.shape[2] != width or not all(tensor.shape):
        raise InvalidRequest(
            f"{name} has the shape {_shape(tensor)}; {model.name} takes (rows, tokens, {width}), none of them 0.", name
        )
    return _floats(tensor, model.driver.compute_class.dtype, tensor.shape, name)


def _prompts(tensor: Tensor, model: BlockModel, span: Span, most: int, what: str) -> Part:
    width = model.driver.width
    fits = len(tensor.shape) == 3 and tensor.shape[0] == len(span) and tensor.shape[2] == width
    if not fits or not 1 <= tensor.shape[1] <= most:
        raise InvalidRequest(
            f"prompts has the shape {_shape(tensor)}; for blocks {span} of {model.name} it is ({len(span)}, length, {width}) "
            f"with a length from 1 to the {most} {what}.",
            "prompts",
        )
    return _floats(tensor, model.driver.compute_class.dtype, tensor.shape, "prompts")


def _floats(tensor: Tensor, dtype: str, shape: tuple[int, ...], name: str) -> Part:
    """A tensor of hidden states: of the model's own type, so that nothing is rounded unasked, and finite."""
    if tensor.shape != shape:
        raise InvalidRequest(f"{name} has the shape {_shape(tensor)}; its output has {_shape_of(shape)}.", name)
    if DTYPES.get(tensor.dtype) != dtype:
        raise InvalidRequest(
            f"{name} is {DTYPES.get(tensor.dtype, tensor.dtype)}; the model computes in {dtype}.", name
        )
    if not _is_finite(tensor):
        raise InvalidRequest(f"{name} has values that are infinite or not a number.", name)
    return Part(name, dtype, tensor.shape, tensor.data)


def _mask(tensor: Tensor, shape: tuple[int, int]) -> Part:
    values = _integers(tensor, ("BOOL", "U8", "I32", "I64"), shape, "attention_mask")
    if ((values != 0) & (values != 1)).any():
        raise InvalidRequest(
            "attention_mask must be 1 where there is a token and 0 where there is none.", "attention_mask"
        )
    return Part("mask", "uint8", shape, values.astype(np.uint8).tobytes())


def _positions(tensor: Tensor, shape: tuple[int, int], max_positions: int) -> Part:
    values = _integers(tensor, ("I32", "I64"), shape, "position_ids")
    if (values < 0).any() or (values >= max_positions).any():
        raise InvalidRequest(f"position_ids must lie between 0 and {max_positions - 1}.", "position_ids")
    return Part("positions", "int32", shape, values.astype("<i4").tobytes())


def _integers(tensor: Tensor, dtypes: tuple[str, ...], shape: tuple[int, int], name: str) -> npt.NDArray[Any]:
    if tensor.shape != shape:
        raise InvalidRequest(f"{name} has the shape {_shape(tensor)}; hidden wants {_shape_of(shape)}.", name)
    if tensor.dtype not in dtypes:
        raise InvalidRequest(f"{name} has the type {tensor.dtype}; it takes {' or '.join(dtypes)}.", name)
    return _items(tensor).reshape(shape)


def _items(tensor: Tensor) -> npt.NDArray[Any]:
    return np.frombuffer(tensor.data, dtype=ITEM_TYPES[tensor.dtype])


def _is_finite(tensor: Tensor) -> bool:
    items = _items(tensor)
    for start in range(0, len(items), SCAN_ITEMS):
        some = items[start : start + SCAN_ITEMS]
        finite = (some & BF16_EXPONENT) != BF16_EXPONENT if tensor.dtype == "BF16" else np.isfinite(some)
        if not finite.all():
            return False
    return True


def _shape(tensor: Tensor) -> str:
    return _shape_of(tensor.shape)


def _shape_of(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
