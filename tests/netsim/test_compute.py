"""What jobs cost."""

from __future__ import annotations

import pytest

from blocks.protocol.device import BackwardJob, Batch, EmbedJob, ForwardJob, LeaseKey, ReleaseJob, SampleJob, SpanJob
from blocks.sampling_params import SamplingParams
from netsim.compute import DEVICES, load_s, seconds
from overlay.rpc.types import Part
from routing.types import Span

CPU, GPU = DEVICES["demo-cpu"], DEVICES["rented-gpu"]
LEASE = LeaseKey(b"s" * 16, 0)


def hidden(*shape: int) -> Part:
    size = 4
    for count in shape:
        size *= count
    return Part("hidden", "float32", shape, bytes(size))


def window(tokens: int, blocks: int) -> SpanJob:
    return SpanJob("m", LEASE, Span(0, blocks), 0, tokens, hidden(tokens, 4), 64)


def test_a_step_through_the_demo_model_takes_what_was_measured() -> None:
    step_s = seconds(CPU, window(1, 12)) + seconds(CPU, SampleJob("m", hidden(1, 4), SamplingParams(), 5))
    assert 1 / step_s == pytest.approx(264.9, rel=0.1)


def test_forward_and_backward_of_the_demo_model_take_what_was_measured() -> None:
    batch = Batch(hidden(16, 128, 4))
    tokens = 16 * 128
    forward_s = seconds(CPU, ForwardJob("m", Span(0, 12), batch))
    backward_s = seconds(CPU, BackwardJob("m", Span(0, 12), batch, hidden(16, 128, 4)))
    assert tokens / forward_s == pytest.approx(6651, rel=0.1)
    assert tokens / (backward_s + forward_s) == pytest.approx(2026, rel=0.25)


def test_eight_layers_of_a_rented_gpu_take_what_was_measured() -> None:
    assert 8.3e-3 <= seconds(GPU, window(1, 8)) <= 10e-3


def test_a_short_window_costs_one_step_and_a_long_one_its_tokens() -> None:
    assert seconds(GPU, window(32, 8)) == seconds(GPU, window(1, 8))
    assert seconds(GPU, window(2048, 8)) > 20 * seconds(GPU, window(1, 8))


def test_time_grows_with_blocks_and_a_release_takes_none() -> None:
    assert seconds(CPU, window(4, 8)) > seconds(CPU, window(4, 4))
    assert seconds(CPU, ReleaseJob(LEASE)) == 0.0
    assert 0 < seconds(CPU, EmbedJob("m", (1,), 0)) < seconds(CPU, window(1, 1))


def test_loading_takes_the_disks_time() -> None:
    assert load_s(CPU, 2_000_000_000) == 2.0
