"""Streams in the simulator: short runs of the scenarios, and what they found in production."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from netsim.outcome import Outcome
from netsim.runner import prepare, run_seed
from overlay.pacing import UrgentTraffic


class Gone:
    """Something to refer to weakly."""


SCENARIOS = Path(__file__).parents[2] / "scenarios"


def outcome_of(name: str, seed: int, **settings: Any) -> Outcome:
    """The scenario with other settings, and whatever came of it."""
    prepared = prepare(SCENARIOS / f"{name}.toml")
    return run_seed(replace(prepared, settings=replace(prepared.settings, **settings)), seed)


def passed(name: str, seed: int = 1, *, except_for: tuple[str, ...] = (), **settings: Any) -> Outcome:
    """The scenario with other settings; its checks hold, except for those that count what the settings made less."""
    outcome = outcome_of(name, seed, **settings)
    broken = [check.metric for check in outcome.checks if not check.holds and check.metric not in except_for]
    assert (outcome.failures, broken) == ((), []), outcome.replay
    return outcome


@pytest.mark.parametrize("where", ["beside-prefill", "behind-modem", "shared-uplink"])
def test_tokens_beside_a_prompt_wait_less_than_60_ms_wherever_the_narrow_place_is(where: str) -> None:
    passed(f"stream-decode-{where}", bulk_bytes=8 << 20, alone_s=1.0, except_for=("beside_s.count",))


def test_without_pacing_they_wait_several_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the simulated modem's queue would be none, and the scenario no test of anything."""
    monkeypatch.setattr(UrgentTraffic, "is_live", lambda self, now: False)
    outcome = outcome_of("stream-decode-behind-modem", 1, bulk_bytes=8 << 20, alone_s=1.0)
    assert outcome.numbers["beside_s.p99"] > 0.1


def test_windows_fill_a_long_fat_path() -> None:
    """A third of it was lost while credit went back by half windows."""
    passed("stream-fill-long-fat-path", windows=28, warm_up=16)


def test_slow_readers_hold_their_windows_and_no_more() -> None:
    passed("stream-slow-readers", for_s=10.0, except_for=("read_bytes",))


def test_nothing_stays_of_streams_that_came_and_went() -> None:
    passed("stream-churn", streams=1200, except_for=("opened",))


def test_both_sides_may_write_before_they_read() -> None:
    passed("stream-crossed-writes", streams=4)


def test_garbage_at_every_layer_ends_typed_and_harms_nobody_else() -> None:
    passed("stream-garbage", attacks=4, except_for=("attacks", "dials", "dials.failed"))


def test_behind_each_kind_of_nat_those_are_met_that_the_known_matrix_says() -> None:
    passed("nat-matrix", 2)


def test_quiet_streams_outlive_what_boxes_remember_and_both_ends_notice_a_box_that_forgot() -> None:
    passed("nat-idle", quiet_s=900.0)


def test_any_path_and_uplink_leaves_tokens_their_way() -> None:
    for seed in (3, 5):
        passed("stream-decode-many-paths", seed, bulk_bytes=4 << 20, alone_s=1.0)


def test_what_stays_of_streams_is_counted_beside_dead_weak_references() -> None:
    gone = Gone()
    held = [weakref.proxy(gone)]  # `isinstance` of it raises once its object is gone
    del gone
    passed("stream-churn", streams=120, except_for=("opened",))
    assert len(held) == 1
