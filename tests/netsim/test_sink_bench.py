"""The fabric with a sink in place of nodes."""

from __future__ import annotations

from netsim.sink_bench import measure_events, measure_memory


def test_every_byte_of_the_load_arrives_at_a_speed_and_for_memory_that_scale() -> None:
    figures = measure_events(hosts=20, dials=4, rounds=20)
    assert figures.delivered_bytes == 20 * 4 * 20 * (200 + (16 << 10))
    assert figures.events_per_s > 5_000  # the target of 50,000 is for `python -m netsim bench` on a quiet core
    assert measure_memory(200) < 2_048


def test_the_benchmark_tells_the_same_story_twice() -> None:
    assert measure_events(10, 3, 5).digest == measure_events(10, 3, 5).digest
