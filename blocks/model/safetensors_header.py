"""Safetensors headers, and which block each tensor belongs to, without torch.

Owns the reading of the format's first bytes (8 bytes of little-endian length, then JSON) with every size checked against the file,
so that a truncated or damaged file is named before anything is mapped. Knows nothing of models but that their tensors' names
carry the block's index as the first number. Format: the safetensors README, "Format".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.model.errors import BadModel
from blocks.model.limits import MAX_HEADER_BYTES, MAX_NAME_CHARS, MAX_TENSOR_RANK, MAX_TENSORS

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "U16": 16, "U32": 32, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip

_FIRST_INDEX = re.compile(r"^(?P<prefix>(?:[^.\d][^.]*\.)*?[^.\d][^.]*)\.(?P<index>\d{1,5})\.")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; ``start`` and ``end`` are offsets in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of a safetensors file, by name.

    Raises:
        BadModel: the file is truncated, damaged or no safetensors at all; the sentence names it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _bad(path, "its header is cut off or is not one")
            document = json.loads(file.read(length))
    except OSError as error:
        raise BadModel(f"{path} can't be read ({error.strerror}): check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header is not JSON") from error
    if not isinstance(document, dict) or len(document) > MAX_TENSORS:
        raise _bad(path, "its header is not a table of tensors")
    document.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in document.items()}
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if end != size:
        raise _bad(path, f"it should have {end} bytes and has {size}")
    return entries


def _entry(path: Path, name: str, fields: Any, base: int) -> TensorEntry:
    if not isinstance(fields, dict) or len(name) > MAX_NAME_CHARS:
        raise _bad(path, "a tensor has no description")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    sound = (
        dtype in ITEM_BITS
        and isinstance(shape, list)
        and len(shape) <= MAX_TENSOR_RANK
        and all(type(size) is int and size >= 0 for size in shape)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(offset) is int for offset in offsets)
        and 0 <= offsets[0] <= offsets[1]
        and (offsets[1] - offsets[0]) * 8 == math.prod(shape) * ITEM_BITS[dtype]
    )
    if not sound or not isinstance(shape, list) or not isinstance(offsets, list):
        raise _bad(path, f"the entry of tensor {name[:80]!r} doesn't add up")
    return TensorEntry(name, str(dtype), tuple(shape), base + offsets[0], base + offsets[1])


def _bad(path: Path, why: str) -> BadModel:
    return BadModel(f"{path} is damaged or no safetensors file ({why}): fetch it again.")


def block_prefix(names: Iterable[str], blocks: int) -> str | None:
    """What precedes the block index in tensor names (``model.layers``): the shortest prefix that counts 0 to blocks-1."""
    seen: dict[str, set[int]] = {}
    for name in names:
        found = _FIRST_INDEX.match(name)
        if found:
            seen.setdefault(found["prefix"], set()).add(int(found["index"]))
    full = [prefix for prefix, indices in seen.items() if all(index in indices for index in range(blocks))]
    return min(full, key=lambda prefix: (len(prefix), prefix)) if full else None


def block_of(name: str, prefix: str) -> int | None:
    """The block that tensor ``name`` belongs to, None where it is outside the blocks."""
    if not name.startswith(prefix + "."):
        return None
    index = name[len(prefix) + 1 :].partition(".")[0]
    return int(index) if index.isdecimal() and len(index) <= 5 else None
