"""The jobs of training as values: in order with decoding, and every failure as the job's own."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from blocks.engine.errors import ComputeFailed, DeviceBusy, NotLoaded
from blocks.engine.parts import array_of, part_of
from blocks.engine.runner import Runner
from blocks.engine.thread import DeviceThread
from blocks.model import batch
from blocks.model.head import Head, load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import load_span
from blocks.protocol.device import (
    BackwardJob,
    Batch,
    EmbedBackwardJob,
    EmbedBatchJob,
    EmbedJob,
    ForwardJob,
    Job,
    JobResult,
    LeaseKey,
    LossJob,
    SpanJob,
)
from overlay.rpc.types import Part
from routing.types import Span
from tests.models import make_tiny

KEY, WHOLE, ROWS, TOKENS, LENGTH, WIDTH = "tiny", Span(0, 4), 2, 6, 3, 32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def runner(source: ModelSource) -> Runner:
    return loaded(Runner(), source)


def loaded(runner: Runner, source: ModelSource) -> Runner:
    runner.install_span(KEY, load_span(source, 0, 4, prepare_steps=False))
    runner.install_head(KEY, load_head(source))
    return runner


def floats(*shape: int, seed: int = 0) -> Part:
    return part_of(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def numbers(values: torch.Tensor, dtype: torch.dtype, name: str) -> Part:
    """As they come from numpy: read-only bytes."""
    whole = values.to(dtype)
    return Part(name, str(dtype).removeprefix("torch."), tuple(whole.shape), whole.numpy().tobytes())


TOKEN_IDS = numbers(torch.arange(ROWS * TOKENS).view(ROWS, TOKENS), torch.int32, "tokens")
LABELS = numbers(torch.arange(ROWS * (LENGTH + TOKENS)).view(ROWS, -1), torch.int32, "labels")
MASK = numbers(torch.ones((ROWS, LENGTH + TOKENS)), torch.uint8, "mask")
MASK_OF_TOKENS = numbers(torch.ones((ROWS, TOKENS)), torch.uint8, "mask")
POSITIONS = numbers(torch.arange(LENGTH + TOKENS).expand(ROWS, -1), torch.int32, "positions")


def good(result: JobResult) -> Part:
    assert result.error is None
    assert result.hidden is not None
    return result.hidden


def test_a_training_step_goes_through_the_jobs(runner: Runner) -> None:
    prefix, prompts = floats(LENGTH, WIDTH), floats(4, LENGTH, WIDTH, seed=1)
    embedded = good(runner.run(EmbedBatchJob(KEY, TOKEN_IDS, prefix)))
    assert embedded.shape == (ROWS, LENGTH + TOKENS, WIDTH)
    given = Batch(embedded, MASK, POSITIONS, prompts)
    output = good(runner.run(ForwardJob(KEY, WHOLE, given)))
    lost = runner.run(LossJob(KEY, output, LABELS, scale=1.0))
    assert lost.count == ROWS * (LENGTH + TOKENS - 1)
    assert lost.loss is not None
    assert lost.loss > 0
    back = runner.run(BackwardJob(KEY, WHOLE, given, good(lost)))
    assert good(back).shape == embedded.shape
    assert back.prompts is not None
    assert (back.prompts.dtype, back.prompts.shape) == ("float32", prompts.shape)
    found = runner.run(EmbedBackwardJob(KEY, TOKEN_IDS, prefix, good(back))).prompts
    assert found is not None
    assert (found.dtype, found.shape) == ("float32", prefix.shape)
    assert array_of(found).abs().max() > 0
    assert array_of(back.prompts).abs().amax(dim=(1, 2)).gt(0).all()


def test_a_batch_can_enter_and_leave_a_span_midway(runner: Runner) -> None:
    hidden, grad = floats(ROWS, TOKENS, WIDTH), floats(ROWS, TOKENS, WIDTH, seed=2)
    middle = good(runner.run(ForwardJob(KEY, Span(0, 1), Batch(hidden))))
    end = good(runner.run(ForwardJob(KEY, Span(1, 4), Batch(middle))))
    assert end == good(runner.run(ForwardJob(KEY, WHOLE, Batch(hidden))))
    late = good(runner.run(BackwardJob(KEY, Span(1, 4), Batch(middle), grad)))
    early = good(runner.run(BackwardJob(KEY, Span(0, 1), Batch(hidden), late)))
    assert early == good(runner.run(BackwardJob(KEY, WHOLE, Batch(hidden), grad)))


def test_values_that_are_not_numbers_simply_compute(runner: Runner) -> None:
    hidden = part_of(torch.full((ROWS, TOKENS, WIDTH), float("nan")))
    assert array_of(good(runner.run(ForwardJob(KEY, WHOLE, Batch(hidden))))).isnan().all()
    assert array_of(good(runner.run(BackwardJob(KEY, WHOLE, Batch(hidden), hidden)))).isnan().any()


@pytest.mark.parametrize(
    "job",
    [
        ForwardJob(KEY, WHOLE, Batch(floats(ROWS, TOKENS, WIDTH + 1))),
        ForwardJob(KEY, WHOLE, Batch(part_of(torch.ones((ROWS, TOKENS, WIDTH)).half()))),
        ForwardJob(KEY, WHOLE, Batch(floats(ROWS, TOKENS, WIDTH), MASK)),
        ForwardJob(KEY, WHOLE, Batch(Part("hidden", "complex64", (1, 1, 1), bytes(8)))),
        ForwardJob(KEY, WHOLE, Batch(Part("hidden", "float32", (1, 1, WIDTH), bytes(8)))),
        ForwardJob(KEY, Span(3, 5), Batch(floats(ROWS, TOKENS, WIDTH))),
        BackwardJob(KEY, WHOLE, Batch(floats(ROWS, TOKENS, WIDTH)), floats(ROWS, 1, WIDTH)),
        EmbedBatchJob(KEY, TOKEN_IDS, floats(LENGTH, WIDTH - 1)),
        EmbedBackwardJob(KEY, TOKEN_IDS, floats(LENGTH, WIDTH), floats(ROWS, TOKENS, WIDTH)),
        LossJob(KEY, floats(ROWS, TOKENS, WIDTH), LABELS),
    ],
    ids=lambda job: type(job).__name__,
)
def test_what_does_not_fit_is_the_jobs_error(runner: Runner, job: Job) -> None:
    result = runner.run(job)
    assert isinstance(result.error, ComputeFailed)
    assert result.hidden is None


def test_a_model_that_is_not_loaded_is_said_to_be(runner: Runner) -> None:
    hidden = floats(ROWS, TOKENS, WIDTH)
    assert isinstance(runner.run(ForwardJob("other", WHOLE, Batch(hidden))).error, NotLoaded)
    assert isinstance(runner.run(EmbedBatchJob("other", TOKEN_IDS)).error, NotLoaded)


def test_full_memory_is_busy(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(batch, "forward", full)
    assert isinstance(runner.run(ForwardJob(KEY, WHOLE, Batch(floats(1, 1, WIDTH)))).error, DeviceBusy)


def test_decoding_goes_before_batches_that_wait(source: ModelSource) -> None:
    order: list[type[Job]] = []

    async def main() -> None:
        device = DeviceThread(make_runner=lambda: loaded(Runner(), source))
        left = asyncio.Event()
        jobs: list[Job] = [ForwardJob(KEY, WHOLE, Batch(floats(ROWS, TOKENS, WIDTH)))] * 3
        jobs += [EmbedJob(KEY, (1, 2), 0)]

        def done(result: JobResult) -> None:
            assert result.error is None
            order.append(type(result.job))
            if len(order) == len(jobs):
                left.set()

        device.start()
        try:
            device.submit(jobs, done)
            async with asyncio.timeout(30):
                await left.wait()
        finally:
            device.stop()

    asyncio.run(main())
    assert EmbedJob in order[:2]


def test_a_head_keeps_nothing_of_a_batch(runner: Runner) -> None:
    prefix = floats(LENGTH, WIDTH)
    good(runner.run(EmbedBatchJob(KEY, TOKEN_IDS, prefix)))
    head: Head = runner._heads[KEY]
    assert all(station.hidden is None and station.call is None for station in head._stations)


@pytest.mark.parametrize("kind", [ForwardJob, BackwardJob])
def test_a_sessions_token_waits_for_a_block_of_a_batch_and_changes_no_bit_of_it(
    source: ModelSource, kind: type[ForwardJob] | type[BackwardJob]
) -> None:
    batched, step = Batch(floats(ROWS, TOKENS, WIDTH), MASK_OF_TOKENS), floats(1, WIDTH, seed=3)
    grad = floats(ROWS, TOKENS, WIDTH, seed=4)
    large: Job = ForwardJob(KEY, WHOLE, batched) if kind is ForwardJob else BackwardJob(KEY, WHOLE, batched, grad)
    token = SpanJob(KEY, LeaseKey(bytes(16), 0), WHOLE, 0, 1, step, 8)
    undisturbed = loaded(Runner(), source)
    expected = {type(token): good(undisturbed.run(token)), kind: good(undisturbed.run(large))}
    found: dict[type[Job], Part] = {}
    between, submitted = threading.Event(), threading.Event()

    async def main() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        was_there = asyncio.Event()

        def in_between() -> None:
            if not between.is_set():
                between.set()
                loop.call_soon_threadsafe(was_there.set)
                assert submitted.wait(30)
            device.run_more_urgent()

        def done(result: JobResult) -> None:
            found[type(result.job)] = good(result)
            if len(found) == 2:
                over.set()

        device = DeviceThread(make_runner=lambda: loaded(Runner(in_between), source))
        device.start()
        try:
            async with asyncio.timeout(30):
                device.submit((large,), done)
                await was_there.wait()
                device.submit((token,), done)
                submitted.set()
                await over.wait()
        finally:
            device.stop()

    asyncio.run(main())
    assert list(found) == [SpanJob, kind]
    assert found == expected


def test_a_batch_lets_no_other_batch_in(runner: Runner) -> None:
    device = DeviceThread(make_runner=lambda: runner)
    device.run_more_urgent()
    device._runner = runner
    device.submit((ForwardJob(KEY, WHOLE, Batch(floats(1, 1, WIDTH))),), lambda result: None)
    device.run_more_urgent()
    assert device.queue_depth == 1
