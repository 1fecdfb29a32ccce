"""Parts and tensors: the same bytes seen from both sides, copied only where a device is elsewhere."""

from __future__ import annotations

import torch

from overlay.rpc.types import Part

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ALL_DTYPES = DTYPES | {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_of(part: Part, device: torch.device) -> torch.Tensor:
    """(1, rows, width) over the part's own bytes (a view on the CPU), unless they are read-only."""
    data = memoryview(part.data)
    flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=DTYPES[part.dtype])
    tensor = flat.view(1, *part.shape)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)


def part_of(rows: torch.Tensor, name: str = "hidden") -> Part:
    """A part over a tensor's own memory (on the CPU); the tensor must not be written to afterwards."""
    rows = rows.detach().cpu().contiguous()
    data: memoryview = rows.view(torch.uint8).numpy().reshape(-1).data
    return Part(name, NAMES[rows.dtype], tuple(rows.shape), data)


def array_of(part: Part) -> torch.Tensor:
    """A part in its own shape, of floats or whole numbers, on the CPU; over its own bytes unless they are read-only.

    Raises:
        ValueError: a dtype that nothing here computes with, or fewer bytes than the shape needs.
    """
    dtype = _ALL_DTYPES.get(part.dtype)
    if dtype is None:
        raise ValueError(f"{part.name} is {part.dtype}, which can't be computed with")
    data = memoryview(part.data)
    writable = bytearray(data) if data.readonly else data  # torch warns of the others
    return torch.frombuffer(writable, dtype=dtype).view(part.shape)
