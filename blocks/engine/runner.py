"""Runs jobs: loaded spans and heads by name, KV caches by lease, and buffers that become tensors without a copy.

Owned by whichever thread is the device's. Knows jobs and models (those of training are in `batch_jobs`); nothing of sessions,
queues or loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from blocks.engine.batch_jobs import BatchJobs, run_batch_job
from blocks.engine.errors import ComputeFailed, DeviceBusy, NotLoaded
from blocks.engine.parts import array_of, part_of, tensor_of
from blocks.model.batch import straight_on
from blocks.model.head import Head
from blocks.model.kv_cache import SpanCache
from blocks.model.sampling import sample
from blocks.model.span import Span
from blocks.protocol.device import EmbedJob, Job, JobResult, LeaseKey, ReleaseJob, SampleJob, SpanJob
from overlay.errors import PeerdError
from routing.types import Span as Blocks


@dataclass(slots=True)
class _Cache:
    kv: SpanCache
    blocks: Blocks


class Runner:
    """See the module. ``between`` is called between two blocks of a batch, and may `run` what is more urgent."""

    def __init__(self, between: Callable[[], None] = straight_on) -> None:
        self._between = between
        self._spans: dict[str, Span] = {}
        self._heads: dict[str, Head] = {}
        self._caches: dict[LeaseKey, _Cache] = {}

    # --- what is loaded ---

    def install_span(self, model: str, span: Span) -> None:
        """Serve ``span`` under the name ``model``, in place of any former one."""
        self.remove_span(model)
        self._spans[model] = span

    def install_head(self, model: str, head: Head) -> None:
        """Embed and sample under the name ``model``."""
        self._heads[model] = head

    def remove_span(self, model: str) -> None:
        """Forget a span; its leases' KV goes when they end."""
        self._spans.pop(model, None)

    def remove_head(self, model: str) -> None:
        self._heads.pop(model, None)

    @property
    def cache_count(self) -> int:
        return len(self._caches)

    # --- jobs ---

    def run(self, job: Job) -> JobResult:
        """Do ``job``; every failure comes back as the result's error."""
        started = time.perf_counter()
        try:
            if isinstance(job, BatchJobs):
                # Not under inference_mode, whose tensors can't be saved for a backward pass.
                result = run_batch_job(job, self._span, self._head, self._between)
            else:
                with torch.inference_mode():
                    result = self._run(job)
        except PeerdError as error:
            result = JobResult(job, error=error)
        except torch.OutOfMemoryError:
            self._release_of(job)
            result = JobResult(job, error=DeviceBusy("The device's memory is full; try again later or elsewhere."))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self._release_of(job)
            result = JobResult(job, error=ComputeFailed(f"A computation failed here: {error}"))
        return replace(result, seconds=time.perf_counter() - started)

    def _run(self, job: Job) -> JobResult:
        if isinstance(job, SpanJob):
            return self._run_span(job)
        if isinstance(job, SampleJob):
            return self._run_sample(job)
        if isinstance(job, EmbedJob):
            head = self._head(job.model)
            return JobResult(job, hidden=part_of(head.embed(job.tokens, job.position)[0]))
        if isinstance(job, ReleaseJob):
            self._release(job.lease)
            return JobResult(job)
        raise ComputeFailed(f"This device doesn't do {type(job).__name__}s.")

    def _run_span(self, job: SpanJob) -> JobResult:
        span = self._span(job.model, job.span)
        cache = self._caches.get(job.lease)
        if cache is None or cache.blocks != job.span:
            cache = self._caches[job.lease] = _Cache(span.new_cache(job.max_tokens), job.span)
        prompts = None if job.prompts is None else array_of(job.prompts).to(span.device, span.dtype)
        output = span.forward(tensor_of(job.hidden, span.device), job.position, cache.kv, prompts)[0]
        if job.keep == 0:
            return JobResult(job)
        if 0 < job.keep < job.tokens:
            output = output[-job.keep :]
        return JobResult(job, hidden=part_of(output))

    def _run_sample(self, job: SampleJob) -> JobResult:
        head = self._head(job.model)
        row = tensor_of(job.hidden, head.device)[:, -1:]
        logits = head.logits(row)[-1]
        token = sample(logits, job.params, job.position, job.history, job.prompt_length)
        return JobResult(
            job,
            hidden=part_of(head.embed((token,), job.position)[0]) if job.embed_next else None,
            token=token,
            logits=part_of(logits.float(), "logits") if job.want_logits else None,
        )

    def _span(self, model: str, blocks: Blocks) -> Span:
        whole = self._spans.get(model)
        if whole is None:
            raise NotLoaded("The blocks are not loaded here any more; plan another route.")
        if (whole.start, whole.end) == (blocks.start, blocks.end):
            return whole
        return whole.section(blocks.start, blocks.end)

    def _head(self, model: str) -> Head:
        head = self._heads.get(model)
        if head is None:
            raise NotLoaded("The model's embeddings and head are not loaded here any more; ask again.")
        return head

    def _release_of(self, job: Job) -> None:
        if isinstance(job, SpanJob):
            self._release(job.lease)

    def _release(self, lease: LeaseKey) -> None:
        for key in [key for key in self._caches if key.session == lease.session and key.hop_index == lease.hop_index]:
            del self._caches[key]
