"""Whole daemons in the simulator: the text is always the model's. Seeds that found something stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from netsim.runner import Outcome, prepare, run_seed

SCENARIOS = Path(__file__).parents[2] / "scenarios"


def ran(name: str, seed: int) -> Outcome:
    outcome = run_seed(prepare(SCENARIOS / f"{name}.toml"), seed)
    assert outcome.passed, (outcome.replay, outcome.failures, [check for check in outcome.checks if not check.holds])
    return outcome


def test_servers_that_start_at_one_moment_share_the_blocks_and_give_the_models_texts() -> None:
    """Seed 1 had all four load blocks 0:6: they placed themselves before they had met anybody."""
    outcome = ran("session-plain", 1)
    assert outcome.numbers["strikes"] == 0


def test_hops_that_are_struck_cost_pauses_and_no_token() -> None:
    outcome = ran("session-loss", 1)
    assert outcome.numbers["replays"] >= outcome.numbers["strikes"] / 2


@pytest.mark.parametrize("seed", [2])
def test_the_same_seed_tells_the_same_story_twice(seed: int) -> None:
    assert ran("session-plain", seed).trace_hash == ran("session-plain", seed).trace_hash
