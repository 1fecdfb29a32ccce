"""Tensors as an HTTP body: the safetensors format, read and written without copying a tensor, with nothing but the standard library.

Owns the header (8 bytes of little-endian length, JSON, then the tensors' bytes) and the check that it adds up; knows neither what the
tensors mean nor any array library, so that the daemon and its clients share it. Format: the safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADER_BYTES_MAX = 1 << 20
TENSORS_MAX = 1 << 16
METADATA_MAX = 64
RANK_MAX = 8
ALIGNMENT = 8
LENGTH_BYTES = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Buffer = bytes | bytearray | memoryview


class BadTensorBody(ValueError):
    """A body that is no sound safetensors; says why."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor: safetensors' name of its type, and its bytes, little-endian and row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Buffer]:
    """The pieces of a body, in order; the tensors' own buffers are among them."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    # Wide items first, as safetensors itself writes them, so that every tensor lies aligned.
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    for name in names:
        tensor = tensors[name]
        end = offset + len(tensor.data)
        document[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return [len(header).to_bytes(LENGTH_BYTES, "little") + header, *(tensors[name].data for name in names)]


def decode(body: Buffer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a body, as views of it, and its metadata.

    Raises:
        BadTensorBody: it is cut off, damaged or no safetensors.
    """
    view = memoryview(body)
    length = int.from_bytes(view[:LENGTH_BYTES], "little")
    if not 2 <= length <= min(HEADER_BYTES_MAX, len(view) - LENGTH_BYTES):
        raise BadTensorBody("its header is cut off, too long, or is not one")
    try:
        document = json.loads(bytes(view[LENGTH_BYTES : LENGTH_BYTES + length]))
    except (ValueError, RecursionError) as error:
        raise BadTensorBody("its header is not JSON") from error
    if not isinstance(document, dict) or len(document) > TENSORS_MAX:
        raise BadTensorBody("its header is not a table of tensors")
    metadata = _metadata(document.pop("__metadata__", {}))
    data = view[LENGTH_BYTES + length :]
    spans = []
    tensors = {}
    for name, fields in document.items():
        start, end, tensors[name] = _tensor(name, fields, data)
        spans.append((start, end))
    _check_cover(sorted(spans), len(data))
    return tensors, metadata


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > METADATA_MAX or not all(isinstance(v, str) for v in value.values()):
        raise BadTensorBody("its __metadata__ is no small table of strings")
    return value


def _tensor(name: str, fields: Any, data: memoryview) -> tuple[int, int, Tensor]:
    if not isinstance(fields, dict):
        raise BadTensorBody(f"the tensor {name[:80]!r} has no description")
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise BadTensorBody(f"the tensor {name[:80]!r} has the type {str(dtype)[:20]!r}, which is unknown here")
    if shape is None or offsets is None or len(offsets) != 2:
        raise BadTensorBody(f"the tensor {name[:80]!r} has no sound shape or offsets")
    start, end = offsets
    if not start <= end <= len(data) or end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BadTensorBody(f"the size of the tensor {name[:80]!r} doesn't add up")
    return start, end, Tensor(dtype, shape, data[start:end])


def _sizes(value: object) -> tuple[int, ...] | None:
    sound = (
        isinstance(value, list) and len(value) <= RANK_MAX and all(type(size) is int and size >= 0 for size in value)
    )
    return tuple(value) if sound and isinstance(value, list) else None


def _check_cover(spans: Sequence[tuple[int, int]], size: int) -> None:
    """Tensors follow each other without gap or overlap, as the format demands."""
    reached = 0
    for start, end in spans:
        if start != reached:
            raise BadTensorBody("its tensors overlap or leave gaps")
        reached = end
    if reached != size:
        raise BadTensorBody(f"its tensors have {reached} bytes, and there are {size}")
