"""A model that is exact arithmetic: blocks over the integers modulo a prime, with KV caches, gradients and deep prompts. Pure.

Owns what stands behind `blocks.protocol.device` where no torch runs, so that exactness can be checked at any scale: every output
depends on every input before it, on its position, on the block and on nothing else; gradients are the formal derivatives, modulo the prime.
Must not know queues, time or sessions. One block, for each column of (tokens, d_model):

    u(t) = (a x(t)^2 + b x(t)) (p(t) + 1) + c          p: position; 0 where the mask is 0
    h(t) = h(t-1) + u(t)                               h is what a KV cache keeps
    y(t) = h(t) + 3 h'(t)                              h': the columns moved by one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blocks.engine.errors import ComputeFailed, NotLoaded
from blocks.protocol.device import (
    BackwardJob,
    Batch,
    EmbedBatchJob,
    EmbedJob,
    ForwardJob,
    Job,
    JobResult,
    LeaseKey,
    ReleaseJob,
    SampleJob,
    SpanJob,
)
from overlay.errors import PeerdError
from overlay.rpc.types import Part
from routing.types import Span

PRIME = 997
MIX = 3
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The model: how many blocks, how wide. Ids are below `PRIME`."""

    blocks: int
    width: int

    def embed(self, tokens: Sequence[int]) -> Numbers:
        """(tokens,) to (tokens, width)."""
        columns = np.arange(self.width, dtype=np.int64)
        return (np.asarray(tokens, np.int64)[:, None] * (7 * columns + 3) + columns * columns + 11) % PRIME

    def token(self, row: Numbers) -> int:
        """What follows a state after the last block."""
        weights = np.arange(1, self.width + 1, dtype=np.int64) ** 2
        return int((row * weights).sum() % PRIME)

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The model's text, in one place and without any of the machinery."""
        tokens, caches, fed = list(prompt), [Cache(self.width) for _ in range(self.blocks)], 0
        while len(tokens) < len(prompt) + count:
            hidden = self.embed(tokens[fed:])
            for block, cache in enumerate(caches):
                hidden = cache.extend(block, hidden, fed)
            fed = len(tokens)
            tokens.append(self.token(hidden[-1]))
        return tokens[len(prompt) :]


def _weights(block: int) -> tuple[int, int, int]:
    return (5 * block + 2) % PRIME, (3 * block + 7) % PRIME, (11 * block + 1) % PRIME


def _states(block: int, hidden: Numbers, places: Numbers, mask: Numbers) -> Numbers:
    """What each token adds to the state: (..., tokens, width)."""
    a, b, c = _weights(block)
    return ((a * hidden * hidden + b * hidden) % PRIME * places + c) * mask % PRIME


def _output(state: Numbers) -> Numbers:
    return (state + MIX * np.roll(state, 1, axis=-1)) % PRIME


class Cache:
    """The states of one block of one session."""

    def __init__(self, width: int) -> None:
        self._rows = np.zeros((1, width), np.int64)

    @property
    def length(self) -> int:
        return len(self._rows) - 1

    def extend(self, block: int, hidden: Numbers, position: int) -> Numbers:
        """Truncate to ``position``, then the block's output for ``hidden`` (tokens, width)."""
        if position > self.length:
            raise ComputeFailed(f"There is a gap before position {position}: {self.length} tokens are here.")
        places = np.arange(position + 1, position + 1 + len(hidden), dtype=np.int64)[:, None]
        added = _states(block, hidden, places, np.ones_like(places))
        state = (self._rows[position] + np.cumsum(added, axis=0)) % PRIME
        self._rows = np.concatenate([self._rows[: position + 1], state])
        return _output(state)


def forward(span: Span, batch: Batch) -> Numbers:
    """Whole rows (rows, tokens, width) through ``span``."""
    hidden, places, mask = _inputs(batch)
    prompts = None if batch.prompts is None else integers_of(batch.prompts)
    for index, block in enumerate(range(span.start, span.end)):
        hidden = _prompted(hidden, prompts, index)
        hidden = _output(np.cumsum(_states(block, hidden, places, mask), axis=1) % PRIME)
    return hidden


def backward(span: Span, batch: Batch, grad: Numbers) -> tuple[Numbers, Numbers | None]:
    """The gradients of rows and of prompts, modulo the prime."""
    hidden, places, mask = _inputs(batch)
    prompts = None if batch.prompts is None else integers_of(batch.prompts)
    inputs = []
    for index, block in enumerate(range(span.start, span.end)):
        hidden = _prompted(hidden, prompts, index)
        inputs.append(hidden)
        hidden = _output(np.cumsum(_states(block, hidden, places, mask), axis=1) % PRIME)
    prompt_grads: list[Numbers] = []
    for block, given in reversed(list(zip(range(span.start, span.end), inputs, strict=True))):
        a, b, _ = _weights(block)
        of_state = (grad + MIX * np.roll(grad, -1, axis=-1)) % PRIME
        of_added = np.cumsum(of_state[:, ::-1], axis=1)[:, ::-1] % PRIME
        grad = of_added * ((2 * a * given + b) % PRIME * places * mask % PRIME) % PRIME
        if prompts is not None:
            prompt_grads.insert(0, grad[:, : prompts.shape[1]].sum(axis=0) % PRIME)
    return grad, np.stack(prompt_grads) if prompt_grads else None


def _inputs(batch: Batch) -> tuple[Numbers, Numbers, Numbers]:
    hidden = integers_of(batch.hidden)
    rows, tokens, _ = hidden.shape
    mask = np.ones((rows, tokens), np.int64) if batch.mask is None else _array(batch.mask, np.uint8)
    if batch.positions is None:
        places = np.broadcast_to(np.arange(tokens, dtype=np.int64), (rows, tokens))
    else:
        places = _array(batch.positions, np.int32)
    return hidden, places[:, :, None] + 1, mask[:, :, None]


def _prompted(hidden: Numbers, prompts: Numbers | None, index: int) -> Numbers:
    if prompts is None:
        return hidden
    hidden = hidden.copy()
    hidden[..., : prompts.shape[1], :] += prompts[index]
    return hidden % PRIME


def _array(part: Part, dtype: type) -> Numbers:
    return np.frombuffer(part.data, dtype).reshape(part.shape).astype(np.int64)


def integers_of(part: Part) -> Numbers:
    """The integers in a part; of floats that are none, whatever they round to."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.frombuffer(part.data, np.float32)).reshape(part.shape).astype(np.int64) % PRIME


def part_of(numbers: Numbers, name: str = "hidden") -> Part:
    """Integers below the prime as float32, which holds them exactly."""
    return Part(name, "float32", numbers.shape, numbers.astype(np.float32).tobytes())


class ArithmeticRunner:
    """Runs jobs on `Arithmetic`; as `blocks.engine.runner.Runner` does on torch."""

    def __init__(self, model: Arithmetic) -> None:
        self._model = model
        self._spans: dict[str, Span] = {}
        self._heads: list[str] = []
        self._caches: dict[LeaseKey, tuple[Span, list[Cache]]] = {}

    def install_span(self, key: str, span: Span) -> None:
        """Serve ``span`` under ``key`` from now on."""
        self._spans[key] = span

    def install_head(self, key: str) -> None:
        """Embed and sample under ``key`` from now on."""
        self._heads.append(key)

    @property
    def cache_count(self) -> int:
        """How many leases have KV here."""
        return len(self._caches)

    def run(self, job: Job) -> JobResult:
        """Do ``job``; what can't be done comes back as the result's error."""
        try:
            return self._run(job)
        except PeerdError as error:
            return JobResult(job, error=error)

    def _run(self, job: Job) -> JobResult:
        if isinstance(job, SpanJob):
            return JobResult(job, hidden=self._span(job))
        if isinstance(job, ReleaseJob):
            lease = job.lease
            for key in [
                key for key in self._caches if (key.session, key.hop_index) == (lease.session, lease.hop_index)
            ]:
                del self._caches[key]
            return JobResult(job)
        if isinstance(job, ForwardJob | BackwardJob):
            return self._batch(job)
        if job.model not in self._heads:
            raise NotLoaded("The model's embeddings and head are not loaded here.")
        if isinstance(job, EmbedJob):
            return JobResult(job, hidden=part_of(self._model.embed(job.tokens)))
        if isinstance(job, EmbedBatchJob):
            return JobResult(job, hidden=part_of(self._embedded(job)))
        if isinstance(job, SampleJob):
            return self._sample(job)
        raise ComputeFailed(f"This device doesn't do {type(job).__name__}s.")

    def _check(self, key: str, span: Span) -> None:
        served = self._spans.get(key)
        if served is None or not served.covers(span):
            raise NotLoaded("The blocks are not loaded here.")

    def _span(self, job: SpanJob) -> Part | None:
        self._check(job.model, job.span)
        held = self._caches.get(job.lease)
        if held is None or held[0] != job.span:
            held = self._caches[job.lease] = (job.span, [Cache(self._model.width) for _ in range(len(job.span))])
        hidden = integers_of(job.hidden)
        prompts = None if job.prompts is None else integers_of(job.prompts)
        for index, cache in enumerate(held[1]):
            if prompts is not None and job.position < prompts.shape[1]:
                hidden = hidden.copy()
                reach = min(len(hidden), prompts.shape[1] - job.position)
                hidden[:reach] += prompts[index, job.position : job.position + reach]
                hidden %= PRIME
            hidden = cache.extend(job.span.start + index, hidden, job.position)
        if job.keep == 0:
            return None
        return part_of(hidden if job.keep < 0 else hidden[-job.keep :])

    def _batch(self, job: ForwardJob | BackwardJob) -> JobResult:
        self._check(job.model, job.span)
        if isinstance(job, ForwardJob):
            return JobResult(job, hidden=part_of(forward(job.span, job.batch)))
        of_hidden, of_prompts = backward(job.span, job.batch, integers_of(job.grad))
        prompts = None if of_prompts is None else part_of(of_prompts, "prompts")
        return JobResult(job, hidden=part_of(of_hidden), prompts=prompts)

    def _embedded(self, job: EmbedBatchJob) -> Numbers:
        tokens = _array(job.tokens, np.int32)
        rows = [self._model.embed(row.tolist()) for row in tokens]
        if job.prefix is not None:
            prefix = integers_of(job.prefix)
            rows = [np.concatenate([prefix, row]) for row in rows]
        return np.stack(rows)

    def _sample(self, job: SampleJob) -> JobResult:
        token = self._model.token(integers_of(job.hidden)[-1])
        embedded = part_of(self._model.embed((token,))) if job.embed_next else None
        logits = np.zeros((1, PRIME), np.int64)
        logits[0, token] = 1
        return JobResult(job, embedded, token, part_of(logits[0], "logits") if job.want_logits else None)


class BlankRunner:
    """Nothing behind the jobs but zeros of the right shapes: for runs where only time and bytes matter."""

    def __init__(self, width: int, dtype: str = "float32") -> None:
        self._width = width
        self._dtype = dtype
        self._bytes = 4 if dtype == "float32" else 2

    def install_span(self, key: str, span: Span) -> None:
        """Any span will do."""

    def install_head(self, key: str) -> None:
        """Any head will do."""

    def run(self, job: Job) -> JobResult:
        """Zeros."""
        if isinstance(job, SpanJob):
            rows = job.tokens if job.keep < 0 else min(job.keep, job.tokens)
            return JobResult(job, hidden=self._zeros((rows, self._width)) if rows else None)
        if isinstance(job, EmbedJob):
            return JobResult(job, hidden=self._zeros((len(job.tokens), self._width)))
        if isinstance(job, SampleJob):
            return JobResult(job, self._zeros((1, self._width)) if job.embed_next else None, 0)
        if isinstance(job, ForwardJob | BackwardJob):
            return JobResult(job, hidden=self._zeros(job.batch.hidden.shape), prompts=job.batch.prompts)
        if isinstance(job, ReleaseJob):
            return JobResult(job)
        return JobResult(job, error=ComputeFailed(f"This device doesn't do {type(job).__name__}s."))

    def _zeros(self, shape: tuple[int, ...]) -> Part:
        return Part("hidden", self._dtype, shape, bytes(int(np.prod(shape)) * self._bytes))
