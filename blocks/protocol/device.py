"""The `Device` port: jobs in, results out, no torch in sight.

Three things implement it: the engine's thread, inline torch, and the simulator's compute model. Everything that
crosses is a frozen value; tensors cross as `overlay.rpc.types.Part` over host memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from blocks.sampling_params import SamplingParams
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from routing.types import Span


class JobPriority(IntEnum):
    """Lower runs first."""

    DECODE = 0
    PREFILL = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True, order=True)
class LeaseKey:
    """What a KV cache belongs to: one hop of one session (one peer may be two hops), one branch of it."""

    session: bytes
    hop_index: int
    branch: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences of hidden states at a boundary, and what blocks have to know about them.

    Attributes:
        hidden: (rows, tokens, d_model) in the compute dtype.
        mask: (rows, tokens) uint8, 1 where there is a token; None: everywhere.
        positions: (rows, tokens) int32; None: as the model numbers them itself.
        prompts: (blocks, length, d_model), added to ``hidden[:, :length]`` before each block; None: nothing is.
    """

    hidden: Part
    mask: Part | None = None
    positions: Part | None = None
    prompts: Part | None = None


@dataclass(frozen=True, slots=True)
class SpanJob:
    """Run one window through ``span`` of ``model``; KV of ``lease`` is first truncated to ``position``.

    ``hidden`` has shape (tokens, d_model) in the compute dtype; the result has the same shape.
    ``max_tokens`` sizes the cache when the lease is new. ``keep`` bounds what comes back: only the last ``keep``
    rows are returned (0: none, -1: all). ``prompts``, of shape (blocks of the span, length, d_model), is added before each block at
    the positions below its length.
    """

    model: str
    lease: LeaseKey
    span: Span
    position: int
    tokens: int
    hidden: Part
    max_tokens: int
    keep: int = -1
    priority: JobPriority = JobPriority.DECODE
    prompts: Part | None = None


@dataclass(frozen=True, slots=True)
class ReleaseJob:
    """Drop the KV of every branch of one hop of one session. Has no result to wait for, but reports done."""

    lease: LeaseKey


@dataclass(frozen=True, slots=True)
class EmbedJob:
    """Token ids at ``position`` to hidden (tokens, d_model)."""

    model: str
    tokens: tuple[int, ...]
    position: int
    priority: JobPriority = JobPriority.DECODE


@dataclass(frozen=True, slots=True)
class SampleJob:
    """The last row of ``hidden`` to the token at ``position``; with ``embed_next`` also that token's embedding.

    ``history`` is the token list so far (prompt and output): penalties and the sampler are functions of it. It may be
    empty when ``params`` needs none. ``want_logits`` also returns the logits row (vocab,) as float32 for the checker.
    """

    model: str
    hidden: Part
    params: SamplingParams
    position: int
    history: Sequence[int] = field(default=(), repr=False)
    prompt_length: int = 0
    embed_next: bool = True
    want_logits: bool = False
    priority: JobPriority = JobPriority.DECODE


@dataclass(frozen=True, slots=True)
class ForwardJob:
    """Run whole sequences through ``span`` of ``model``, without KV.

    ``batch.hidden`` has shape (rows, tokens, d_model) in the compute dtype; the result has the same shape.
    """

    model: str
    span: Span
    batch: Batch
    priority: JobPriority = JobPriority.BACKGROUND


@dataclass(frozen=True, slots=True)
class BackwardJob:
    """Recompute `ForwardJob` and take ``grad``, the gradient of its output, back through it.

    The result's ``hidden`` is the gradient of ``batch.hidden``, its ``prompts`` that of ``batch.prompts``, summed over rows in order.
    """

    model: str
    span: Span
    batch: Batch
    grad: Part
    priority: JobPriority = JobPriority.BACKGROUND


@dataclass(frozen=True, slots=True)
class EmbedBatchJob:
    """Token ids (rows, tokens) int32, behind ``prefix`` (length, d_embedding) if any, to hidden (rows, length + tokens, d_model)."""

    model: str
    tokens: Part
    prefix: Part | None = None
    priority: JobPriority = JobPriority.BACKGROUND


@dataclass(frozen=True, slots=True)
class EmbedBackwardJob:
    """The gradient of `EmbedBatchJob`'s output back to its prefix, summed over rows in order: the result's ``prompts``, float32."""

    model: str
    tokens: Part
    prefix: Part
    grad: Part
    priority: JobPriority = JobPriority.BACKGROUND


@dataclass(frozen=True, slots=True)
class LossJob:
    """Cross-entropy of what follows: ``hidden`` (rows, tokens, d_model) of the last block against ``labels`` (rows, tokens) int32.

    Row i's output at position j is compared with its label at j + 1, as `transformers` does; labels below 0 don't count. The result's
    ``loss`` is the *sum* over the positions that count, in float32, its ``count`` their number; with ``scale`` its ``hidden`` is the
    gradient of ``scale`` x that sum.
    """

    model: str
    hidden: Part
    labels: Part
    scale: float | None = None
    priority: JobPriority = JobPriority.BACKGROUND


Job = (
    SpanJob | ReleaseJob | EmbedJob | SampleJob | ForwardJob | BackwardJob | EmbedBatchJob | EmbedBackwardJob | LossJob
)


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of a job: ``error`` set, or the fields that the job promises."""

    job: Job
    hidden: Part | None = None
    token: int | None = None
    logits: Part | None = None
    error: PeerdError | None = None
    seconds: float = 0.0
    prompts: Part | None = None
    loss: float | None = None
    count: int | None = None


class Device(Protocol):
    """One accelerator (or the CPU). Jobs of one lease run in the order of submission; others by priority."""

    def submit(self, jobs: Sequence[Job], done: Callable[[JobResult], None]) -> None:
        """Queue ``jobs``; ``done`` is called once for each, on the event loop's thread.

        A full queue (`DEVICE_QUEUE_JOBS`) reports `DeviceBusy` through ``done``; this call never raises for load and
        never blocks.
        """

    @property
    def step_count(self) -> int:
        """How many jobs have finished: what heartbeats show as progress."""

    @property
    def queue_depth(self) -> int:
        """Jobs waiting or running."""


class OwnDevice(Device, Protocol):
    """A device with its life, as the node that owns it has it."""

    def start(self) -> None:
        """From the loop's thread; jobs that were submitted before wait."""

    def stop(self) -> None:
        """What waits is not run."""

    def call(self, work: Callable[[Any], None]) -> Awaitable[None]:
        """Run ``work(runner)`` between jobs, where the jobs run (to install or remove a model); await its end."""
