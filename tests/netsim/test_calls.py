"""Forward and backward over whole daemons in the simulator: gradients are always the model's."""

from __future__ import annotations

from pathlib import Path

from netsim.runner import prepare, run_seed

SCENARIOS = Path(__file__).parents[2] / "scenarios"


def test_batches_whose_servers_are_struck_come_back_with_the_models_gradients() -> None:
    outcome = run_seed(prepare(SCENARIOS / "call-loss.toml"), 1)
    assert outcome.passed, (outcome.replay, outcome.failures, [check for check in outcome.checks if not check.holds])
    assert outcome.numbers["servers_lost"] >= 1
