"""The jobs of training: whole batches through a span and back, and both ends of a model with their gradients.

Owns the way between jobs and `blocks.model`'s functions; keeps nothing. Run it where gradients can be recorded: outside inference mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from blocks.engine.errors import ComputeFailed
from blocks.engine.parts import array_of, part_of
from blocks.model import batch, training_head
from blocks.model.head import Head
from blocks.model.span import Span
from blocks.protocol.device import (
    BackwardJob,
    Batch,
    EmbedBackwardJob,
    EmbedBatchJob,
    ForwardJob,
    JobResult,
    LossJob,
)
from overlay.rpc.types import Part
from routing.types import Span as Blocks

BatchJobs = ForwardJob | BackwardJob | EmbedBatchJob | EmbedBackwardJob | LossJob


def run_batch_job(
    job: BatchJobs,
    span_of: Callable[[str, Blocks], Span],
    head_of: Callable[[str], Head],
    between: Callable[[], None] = batch.straight_on,
) -> JobResult:
    """Do ``job``; ``between`` is called before each block of a span.

    Raises:
        PeerdError: what it names isn't loaded, or can't do this.
        RuntimeError, ValueError, IndexError, TypeError: it doesn't fit the model, or the device failed.
    """
    if isinstance(job, ForwardJob):
        span = span_of(job.model, job.span)
        return JobResult(job, hidden=part_of(batch.forward(span, _sequences(span, job.batch), between)))
    if isinstance(job, BackwardJob):
        span = span_of(job.model, job.span)
        grad = _floats(job.grad, span.dtype, span.device)
        found = batch.backward(span, _sequences(span, job.batch), grad, between)
        prompts = None if found.prompts is None else part_of(found.prompts, "prompts")
        return JobResult(job, hidden=part_of(found.hidden), prompts=prompts)
    return _run_at_an_end(job, head_of(job.model))


def _run_at_an_end(job: EmbedBatchJob | EmbedBackwardJob | LossJob, head: Head) -> JobResult:
    if isinstance(job, EmbedBatchJob):
        prefix = None if job.prefix is None else array_of(job.prefix)
        return JobResult(job, hidden=part_of(training_head.embed_batch(head, array_of(job.tokens), prefix)))
    if isinstance(job, EmbedBackwardJob):
        grad = _floats(job.grad, head.dtype, head.device)
        found = training_head.embed_backward(head, array_of(job.tokens), array_of(job.prefix), grad)
        return JobResult(job, prompts=part_of(found, "prompts"))
    lost = training_head.loss(head, _floats(job.hidden, head.dtype, head.device), array_of(job.labels), job.scale)
    taken_back = None if lost.grad is None else part_of(lost.grad)
    return JobResult(job, hidden=taken_back, loss=lost.total, count=lost.count)


def _sequences(span: Span, given: Batch) -> batch.Sequences:
    return batch.Sequences(
        _floats(given.hidden, span.dtype, span.device),
        None if given.mask is None else array_of(given.mask),
        None if given.positions is None else array_of(given.positions),
        None if given.prompts is None else array_of(given.prompts).to(span.device, span.dtype),
    )


def _floats(part: Part, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = array_of(part)
    if tensor.dtype != dtype:
        raise ComputeFailed(f"{part.name} is {part.dtype}, and the model computes in {dtype}.")
    return tensor.to(device, non_blocking=True)
