"""What a device's job costs: seconds as a function of device, tokens and blocks, from measured figures. Pure.

Owns the classes of device and the arithmetic; must not know queues, loops or what the numbers behind a job are. A job runs for

    overhead + blocks x max(step, tokens x token) x passes

where ``step`` is the time in which a block's weights are read once (what a single token pays), ``token`` the arithmetic of one token
where a window is long enough to be bound by it, and ``passes`` is 1 forward and `BACKWARD_PASSES` for forward and backward together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blocks.protocol.device import (
    BackwardJob,
    EmbedBackwardJob,
    EmbedBatchJob,
    EmbedJob,
    ForwardJob,
    Job,
    LossJob,
    ReleaseJob,
    SampleJob,
    SpanJob,
)

BACKWARD_PASSES = 3.0
"""Forward is run again, and backward is twice its arithmetic; measured on our CPU engine: 6,033 / 2,099 and 4,074 / 1,317 tokens/s."""
HEAD_BLOCKS = 1.0
"""Embedding is a copy; the head costs a token about as much as a block of the same model does."""


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """One kind of machine running one kind of model.

    Attributes:
        step_s: one token through one block.
        token_s: each token of a long window, through one block.
        overhead_s: of a job, whatever it is.
        load_bytes_per_s: weights from disk to the device.
    """

    step_s: float
    token_s: float
    overhead_s: float = 0.25e-3
    load_bytes_per_s: float = 1e9


DEVICES: Mapping[str, DeviceClass] = {
    # docs/benchmarks.md: 264.9 steps/s and 6,651 tokens/s through 12 blocks of the demo model; a hand-over takes 249 us.
    "demo-cpu": DeviceClass(0.27e-3, 12.5e-6, 0.25e-3),
    # 8.3 to 10 ms a step for 8 layers of a 284B (13B active) model with graphs, 11.5 ms for 13 layers of M2.5 (shard, RTX 5090).
    "rented-gpu": DeviceClass(1.05e-3, 16e-6, 0.05e-3),
    # The same 9-layer stage captured and eager: 5.4 and 22.9 ms; a home machine runs eagerly, and shares its card with a desktop.
    "home-gpu": DeviceClass(2.5e-3, 60e-6, 0.25e-3, load_bytes_per_s=0.5e9),
    # 35 to 50 ms for the same 8 layers where the host's CPU is loaded (shard).
    "busy-gpu": DeviceClass(5.3e-3, 80e-6, 1.0e-3, load_bytes_per_s=0.3e9),
    # Not measured: blocks of 400 MB read at 20 GB/s, 200 M parameters of arithmetic a token at 0.4 TFLOP/s.
    "home-cpu": DeviceClass(20e-3, 1e-3, 0.25e-3, load_bytes_per_s=0.5e9),
    # No compute at all: what is left is the network and our own code.
    "instant": DeviceClass(0.0, 0.0, 0.0, load_bytes_per_s=1e12),
}
"""Where ``token_s`` isn't measured (the GPUs) it is taken as a 64th of ``step_s`` or more: below 64 tokens a window is bound by memory."""


def seconds(device: DeviceClass, job: Job) -> float:
    """How long ``job`` runs on an idle device of this class."""
    if isinstance(job, ReleaseJob):
        return 0.0
    blocks, tokens, passes = _size_of(job)
    return device.overhead_s + passes * blocks * max(device.step_s, tokens * device.token_s)


def _size_of(job: Job) -> tuple[float, int, float]:
    """Blocks, tokens and passes of anything but a release."""
    if isinstance(job, SpanJob):
        return len(job.span), job.tokens, 1.0
    if isinstance(job, ForwardJob | BackwardJob):
        rows, tokens, _ = job.batch.hidden.shape
        return len(job.span), rows * tokens, BACKWARD_PASSES if isinstance(job, BackwardJob) else 1.0
    if isinstance(job, SampleJob):
        return HEAD_BLOCKS, 1, 1.0
    if isinstance(job, LossJob):
        rows, tokens, _ = job.hidden.shape
        return HEAD_BLOCKS, rows * tokens, BACKWARD_PASSES if job.scale is not None else 1.0
    assert isinstance(job, EmbedJob | EmbedBatchJob | EmbedBackwardJob)
    return 0.0, 0, 1.0


def load_s(device: DeviceClass, weight_bytes: int) -> float:
    """How long weights take from disk to the device."""
    return weight_bytes / device.load_bytes_per_s
