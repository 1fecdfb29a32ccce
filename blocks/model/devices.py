"""Which device this machine can really compute on.

Asks torch, whose import takes seconds: call it where that doesn't matter.
"""

from __future__ import annotations

import torch

from blocks.model.errors import DeviceMissing

AUTO = "auto"
CPU = "cpu"


def usable_device(wanted: str) -> str:
    """A device's name as torch knows it; ``auto`` is the first CUDA device, or the CPU where there is none.

    Raises:
        DeviceMissing: this machine, or the torch that is installed, has no such device.
    """
    if wanted == CPU:
        return CPU
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == AUTO:
        return "cuda:0" if there else CPU
    number = int(wanted.partition(":")[2] or 0)
    if number < there:
        return f"cuda:{number}"
    if torch.version.cuda is None:
        raise DeviceMissing(
            f"The installed PyTorch {torch.__version__} is built without CUDA; use --device cpu, or install another build."
        )
    raise DeviceMissing(
        f"There is no {wanted} here (CUDA devices that PyTorch sees: {there}); use --device auto or cpu."
    )
