"""The exact model: however it is cut, chunked and spread, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from blocks.protocol.device import (
    BackwardJob,
    Batch,
    EmbedJob,
    ForwardJob,
    LeaseKey,
    ReleaseJob,
    SampleJob,
    SpanJob,
)
from blocks.sampling_params import SamplingParams
from netsim.arithmetic import PRIME, Arithmetic, ArithmeticRunner, Numbers, backward, forward, integers_of, part_of
from overlay.rpc.types import Part
from routing.types import Span

MODEL = Arithmetic(6, 4)
LEASE = LeaseKey(b"s" * 16, 0)
PROMPT = tuple(range(3, 20))
GREEDY = SamplingParams()


def runner() -> ArithmeticRunner:
    made = ArithmeticRunner(MODEL)
    made.install_span("m", Span(0, 6))
    made.install_head("m")
    return made


def span_job(span: Span, position: int, hidden: Part, keep: int = -1, lease: LeaseKey = LEASE) -> SpanJob:
    return SpanJob("m", lease, span, position, hidden.shape[0], hidden, 64, keep)


def numbers(seed: int, *shape: int) -> Numbers:
    return np.random.default_rng(seed).integers(0, PRIME, shape)


def run(device: ArithmeticRunner, job: SpanJob) -> Part:
    result = device.run(job)
    assert result.error is None
    assert result.hidden is not None
    return result.hidden


def test_jobs_through_two_spans_make_the_text_of_the_whole_model() -> None:
    device = runner()
    tokens, fed = list(PROMPT), 0
    while len(tokens) < len(PROMPT) + 8:
        embedded = device.run(EmbedJob("m", tuple(tokens[fed:]), fed)).hidden
        assert embedded is not None
        half = run(device, span_job(Span(0, 2), fed, embedded))
        whole = run(device, span_job(Span(2, 6), fed, half, 1, LeaseKey(b"s" * 16, 1)))
        token = device.run(SampleJob("m", whole, GREEDY, len(tokens))).token
        fed = len(tokens)
        assert token is not None
        tokens.append(token)
    assert tokens[len(PROMPT) :] == MODEL.generate(PROMPT, 8)


def test_chunks_give_what_a_whole_window_gives_and_old_tokens_can_be_taken_back() -> None:
    hidden = numbers(1, 9, 4)
    whole = integers_of(run(runner(), span_job(Span(0, 6), 0, part_of(hidden))))
    device = runner()
    run(device, span_job(Span(0, 6), 0, part_of(hidden[:4])))
    run(device, span_job(Span(0, 6), 4, part_of(numbers(2, 3, 4))))
    again = integers_of(run(device, span_job(Span(0, 6), 4, part_of(hidden[4:]))))
    assert (again == whole[4:]).all()


def test_every_input_and_its_place_count() -> None:
    hidden = numbers(3, 5, 4)
    whole = forward(Span(0, 6), Batch(part_of(hidden[None])))
    swapped = forward(Span(0, 6), Batch(part_of(hidden[[1, 0, 2, 3, 4]][None])))
    shifted = forward(Span(1, 6), Batch(part_of(hidden[None])))
    assert (whole[0, -1] != swapped[0, -1]).any()
    assert (whole[0, -1] != shifted[0, -1]).any()


def test_a_batch_gives_what_sessions_give() -> None:
    hidden = numbers(4, 7, 4)
    session = integers_of(run(runner(), span_job(Span(0, 6), 0, part_of(hidden))))
    assert (forward(Span(0, 6), Batch(part_of(hidden[None])))[0] == session).all()


def test_the_gradient_is_the_formal_derivative_whichever_way_it_is_taken() -> None:
    """Backward through the whole is backward through its parts; and it is linear, as a derivative has to be."""
    hidden, grad = numbers(5, 2, 5, 4), numbers(6, 2, 5, 4)
    whole, _ = backward(Span(0, 6), Batch(part_of(hidden)), grad)
    middle = forward(Span(0, 3), Batch(part_of(hidden)))
    late, _ = backward(Span(3, 6), Batch(part_of(middle)), grad)
    early, _ = backward(Span(0, 3), Batch(part_of(hidden)), late)
    assert (early == whole).all()
    doubled, _ = backward(Span(0, 6), Batch(part_of(hidden)), 2 * grad % PRIME)
    assert (doubled == 2 * whole % PRIME).all()


def test_the_gradient_predicts_what_a_quadratic_does() -> None:
    """f(x + d) - f(x - d) = 2 d f'(x), exactly, for one block: it is a polynomial of degree 2."""
    hidden, grad = numbers(7, 1, 4, 4), numbers(8, 1, 4, 4)
    step = np.zeros_like(hidden)
    step[0, 1, 2] = 1
    span = Span(3, 4)
    above = forward(span, Batch(part_of((hidden + step) % PRIME)))
    below = forward(span, Batch(part_of((hidden - step) % PRIME)))
    found, _ = backward(span, Batch(part_of(hidden)), grad)
    assert ((above - below) * grad).sum() % PRIME == 2 * found[0, 1, 2] % PRIME


def test_deep_prompts_count_and_get_their_gradient() -> None:
    hidden, grad, prompts = numbers(9, 2, 5, 4), numbers(10, 2, 5, 4), numbers(11, 6, 2, 4)
    batch = Batch(part_of(hidden), prompts=part_of(prompts, "prompts"))
    of_hidden, of_prompts = backward(Span(0, 6), batch, grad)
    assert of_prompts is not None
    assert of_prompts.shape == (6, 2, 4)
    assert (of_prompts[0] == of_hidden[:, :2].sum(axis=0) % PRIME).all()
    device = runner()
    result = device.run(ForwardJob("m", Span(0, 6), batch)).hidden
    assert result is not None
    plain = device.run(ForwardJob("m", Span(0, 6), Batch(part_of(hidden)))).hidden
    assert plain is not None
    assert (integers_of(result) != integers_of(plain)).any()


def test_deep_prompts_of_a_session_are_those_of_a_batch_in_chunks_too() -> None:
    hidden, prompts = numbers(12, 6, 4), part_of(numbers(13, 6, 3, 4), "prompts")
    whole = forward(Span(0, 6), Batch(part_of(hidden[None]), prompts=prompts))[0]
    device = runner()
    first = SpanJob("m", LEASE, Span(0, 6), 0, 2, part_of(hidden[:2]), 64, prompts=prompts)
    second = SpanJob("m", LEASE, Span(0, 6), 2, 4, part_of(hidden[2:]), 64, prompts=prompts)
    found = [integers_of(run(device, job)) for job in (first, second)]
    assert (np.concatenate(found) == whole).all()


def test_what_is_not_loaded_and_gaps_are_errors_and_a_release_forgets() -> None:
    device = ArithmeticRunner(MODEL)
    device.install_span("m", Span(0, 2))
    hidden = part_of(numbers(14, 1, 4))
    assert device.run(span_job(Span(0, 6), 0, hidden)).error is not None
    assert device.run(span_job(Span(0, 2), 3, hidden)).error is not None
    assert device.run(EmbedJob("m", (1,), 0)).error is not None
    run(device, span_job(Span(0, 2), 0, hidden))
    assert device.cache_count == 1
    device.run(ReleaseJob(LEASE))
    assert device.cache_count == 0


@pytest.mark.parametrize("kind", [ForwardJob, BackwardJob])
def test_jobs_of_batches_come_back_as_parts_of_the_same_shape(kind: type) -> None:
    batch = Batch(part_of(numbers(15, 2, 3, 4)))
    job = kind("m", Span(0, 6), batch) if kind is ForwardJob else kind("m", Span(0, 6), batch, batch.hidden)
    result = runner().run(job)
    assert result.hidden is not None
    assert result.hidden.shape == (2, 3, 4)
