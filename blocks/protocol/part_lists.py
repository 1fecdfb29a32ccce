"""Parts put together again: rows one after the other, float32 sums in one order. Pure, on numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from overlay.rpc.types import Part


def joined(name: str, parts: Sequence[Part]) -> Part:
    """Parts one after the other along their first dimension; a single one is not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.name == name else replace(first, name=name)
    data = b"".join(memoryview(part.data).cast("B") for part in parts)
    return Part(name, first.dtype, (sum(part.shape[0] for part in parts), *first.shape[1:]), data)


def summed(name: str, parts: Sequence[Part]) -> Part:
    """The sum of float32 parts, first to last: a sum of floats depends on its order. A single one is not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first if first.name == name else replace(first, name=name)
    total = np.frombuffer(first.data, np.float32).copy()
    for part in parts[1:]:
        total += np.frombuffer(part.data, np.float32)
    return Part(name, "float32", first.shape, total.tobytes())
