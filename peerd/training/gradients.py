"""Gradients and values on the driver's side: between the compute dtype and float32, and summed in one order.

Pure, on numpy. A sum of floats depends on its order, so the order of micro-batches is the order here, whoever computed them, and whenever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from overlay.rpc.types import Part

Floats = npt.NDArray[np.float32]
_MANTISSA_CUT = 16
"""Bits of float32 that bfloat16 lacks."""


def widened(part: Part) -> Floats:
    """The values of a part of float32, float16 or bfloat16, exactly."""
    if part.dtype == "bfloat16":
        high = np.frombuffer(part.data, np.uint16).astype(np.uint32) << np.uint32(_MANTISSA_CUT)
        return high.view(np.float32).reshape(part.shape)
    return np.frombuffer(part.data, np.dtype(part.dtype)).astype(np.float32).reshape(part.shape)


def narrowed(part: Part, dtype: str) -> Part:
    """A float32 part in the compute dtype, rounded to nearest, ties to even."""
    if dtype == part.dtype:
        return part
    values = widened(part)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # infinite, as in torch
            return Part(part.name, dtype, part.shape, values.astype(np.dtype(dtype)).tobytes())
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(_MANTISSA_CUT)) & np.uint32(1)
    rounded = ((bits + odd + np.uint32(0x7FFF)) >> np.uint32(_MANTISSA_CUT)).astype(np.uint16)
    kept = (bits >> np.uint32(_MANTISSA_CUT)).astype(np.uint16) | np.uint16(1)
    return Part(part.name, dtype, part.shape, np.where(np.isnan(values), kept, rounded).tobytes())


def mean(name: str, parts: Sequence[Part], divisor: float) -> Part:
    """The sum in float32, first to last, divided once."""
    total = widened(parts[0]).copy()
    with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite is the optimizer's to skip
        for part in parts[1:]:
            total += widened(part)
        total /= np.float32(divisor)
    return Part(name, "float32", total.shape, total.tobytes())
