"""The `Device` port: jobs in, results out, no torch in sight.

Three things implement it: the engine's thread, inline torch, and the simulator's compute model. Everything that
crosses is a frozen value; tensors cross as `overlay.rpc.types.Part` over host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

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
class SpanJob:
    """Run one window through ``span`` of ``model``; KV of ``lease`` is first truncated to ``position``.

    ``hidden`` has shape (tokens, d_model) in the compute dtype; the result has the same shape.
    ``max_tokens`` sizes the cache when the lease is new. ``keep`` bounds what comes back: only the last ``keep``
    rows are returned (0: none, -1: all).
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


Job = SpanJob | ReleaseJob | EmbedJob | SampleJob


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of a job: ``error`` set, or the fields that the job promises."""

    job: Job
    hidden: Part | None = None
    token: int | None = None
    logits: Part | None = None
    error: PeerdError | None = None
    seconds: float = 0.0


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
