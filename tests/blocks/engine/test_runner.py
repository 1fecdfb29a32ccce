"""Jobs as values against the whole model: spans, parts of spans, leases, heads, and what goes wrong."""

from __future__ import annotations

import pytest
import torch

from blocks.engine.parts import part_of, tensor_of
from blocks.engine.runner import Runner
from blocks.model.exact import Reference
from blocks.model.head import load_head
from blocks.model.source import ModelSource, resolve
from blocks.model.span import load_span
from blocks.protocol.device import EmbedJob, JobResult, LeaseKey, ReleaseJob, SampleJob, SpanJob
from blocks.sampling_params import SamplingParams
from overlay.rpc.types import Part
from routing.types import Span
from tests.models import make_tiny

KEY, WHOLE = "tiny", Span(0, 4)
PROMPT, NEW = (7, 3, 99, 12, 40, 5), 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve(str(make_tiny("llama", tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def expected(source: ModelSource) -> list[int]:
    return Reference.load(source).greedy(PROMPT, NEW)


@pytest.fixture
def runner(source: ModelSource) -> Runner:
    runner = Runner()
    runner.install_span(KEY, load_span(source, 0, 4))
    runner.install_head(KEY, load_head(source))
    return runner


def good(result: JobResult) -> Part:
    assert result.error is None
    assert result.hidden is not None
    return result.hidden


def decode(runner: Runner, spans: tuple[Span, ...], session: bytes = b"s" * 16) -> list[int]:
    """Greedy tokens through ``spans``, each with its own lease."""
    hidden, position, tokens = good(runner.run(EmbedJob(KEY, PROMPT, 0))), 0, list[int]()
    while True:
        count = hidden.shape[0]
        for index, span in enumerate(spans):
            lease = LeaseKey(session, index)
            hidden = good(runner.run(SpanJob(KEY, lease, span, position, count, hidden, len(PROMPT) + NEW)))
        position += count
        result = runner.run(SampleJob(KEY, hidden, SamplingParams(), position))
        assert result.token is not None
        tokens.append(result.token)
        if len(tokens) == NEW:
            return tokens
        hidden = good(result)


def test_jobs_through_one_span_give_the_tokens_of_the_whole_model(runner: Runner, expected: list[int]) -> None:
    assert decode(runner, (WHOLE,)) == expected


def test_a_span_can_be_entered_and_left_midway(runner: Runner, expected: list[int]) -> None:
    assert decode(runner, (Span(0, 1), Span(1, 3), Span(3, 4))) == expected


def test_sessions_do_not_see_each_other(runner: Runner, expected: list[int]) -> None:
    first = decode(runner, (WHOLE,), b"a" * 16)
    assert [first, decode(runner, (WHOLE,), b"b" * 16)] == [expected, expected]
    assert runner.cache_count == 2


def test_a_released_lease_is_forgotten_and_others_stay(runner: Runner) -> None:
    decode(runner, (Span(0, 2), Span(2, 4)))
    assert runner.cache_count == 2
    assert runner.run(ReleaseJob(LeaseKey(b"s" * 16, 0))).error is None
    assert runner.cache_count == 1


def test_keep_bounds_what_comes_back(runner: Runner) -> None:
    hidden = good(runner.run(EmbedJob(KEY, PROMPT, 0)))

    def run(keep: int) -> JobResult:
        return runner.run(SpanJob(KEY, LeaseKey(b"k" * 16, 0), WHOLE, 0, len(PROMPT), hidden, 32, keep))

    whole = good(run(-1))
    assert whole.shape == (len(PROMPT), 32)
    assert run(0).hidden is None
    assert bytes(good(run(1)).data) == bytes(whole.data)[-32 * 4 :]


def test_a_step_back_truncates_and_gives_the_same_rows(runner: Runner) -> None:
    hidden = good(runner.run(EmbedJob(KEY, PROMPT, 0)))
    lease = LeaseKey(b"t" * 16, 0)
    first = good(runner.run(SpanJob(KEY, lease, WHOLE, 0, len(PROMPT), hidden, 32)))
    again = good(runner.run(SpanJob(KEY, lease, WHOLE, 0, len(PROMPT), hidden, 32)))
    assert bytes(first.data) == bytes(again.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_views_of_tensors_both_ways(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 8).to(dtype)
    part = part_of(rows)
    back = tensor_of(part, torch.device("cpu"))
    assert torch.equal(back[0], rows)
    assert back.data_ptr() == rows.data_ptr()


def test_an_unknown_model_is_told_by_code(runner: Runner) -> None:
    runner.remove_head(KEY)
    runner.remove_span(KEY)
    hidden = Part("hidden", "float32", (1, 32), bytes(128))
    for job in (SpanJob(KEY, LeaseKey(b"u" * 16, 0), WHOLE, 0, 1, hidden, 4), EmbedJob(KEY, (1,), 0)):
        error = runner.run(job).error
        assert error is not None
        assert error.code == "not-served"


def test_a_job_that_breaks_comes_back_as_an_error_and_frees_its_lease(runner: Runner, expected: list[int]) -> None:
    hidden = good(runner.run(EmbedJob(KEY, PROMPT, 0)))
    lease = LeaseKey(b"v" * 16, 0)
    for position, room in ((3, 32), (0, 2)):  # a gap; more tokens than the lease has room for
        assert runner.run(SpanJob(KEY, lease, WHOLE, position, len(PROMPT), hidden, room)).error is not None
    assert runner.run(EmbedJob(KEY, (10**6,), 0)).error is not None
    assert decode(runner, (WHOLE,)) == expected


def test_a_row_that_is_not_a_number_is_no_error_of_the_device(runner: Runner) -> None:
    hidden = part_of(torch.full((1, 32), float("nan")))
    result = runner.run(SpanJob(KEY, LeaseKey(b"n" * 16, 0), WHOLE, 0, 1, hidden, 4))
    assert result.error is None
    assert runner.run(SampleJob(KEY, good(result), SamplingParams(), 1)).token is not None
