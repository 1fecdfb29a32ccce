"""Many whole daemons at once, in small: they place themselves, leave and come back, and texts of blank numbers are done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from netsim.runner import prepare, run_seed

SCENARIOS = Path(__file__).parents[2] / "scenarios"
HOSTS = {"boot": 1, "home": 4, "rented": 2, "busy": 2, "cpu": 1, "driver": 1}


def test_servers_of_four_kinds_share_the_blocks_and_leave_while_texts_run() -> None:
    prepared = prepare(SCENARIOS / "crowd-40.toml")
    scenario = prepared.scenario
    hosts = {
        name: replace(told, count=HOSTS[name], start_s=(0.0, 0.0) if name == "boot" else (0.5, 2.0))
        for name, told in scenario.hosts.items()
    }
    blocks = {
        name: replace(told, blocks=8, block_bytes=50_000_000, max_blocks=4)
        for name, told in prepared.group_settings.items()
    }
    assert scenario.churn is not None
    churn = replace(
        scenario.churn,
        from_s=6.0,
        until_s=8.0,
        leaves_per_hour=600.0,
        clean=0.0,
        crash=1.0,
        vanish=0.0,
        back_after_s=(0.5, 1.0),
    )
    small = replace(
        prepared,
        scenario=replace(scenario, hosts=hosts, churn=churn, channel="null", rss_mib_max=None),
        settings=replace(prepared.settings, texts=1, new_tokens=(16, 20), settled_s=6.0, leases_end_s=4.5),
        group_settings=blocks,
    )
    outcome = run_seed(small, 1, is_timed=False)
    too_short = ("texts.done", "throughput", "known.share.min")  # one text, and less time than between two idle looks
    broken = [check for check in outcome.checks if not check.holds and check.metric not in too_short]
    assert (list(outcome.failures), broken) == ([], [])
    assert outcome.numbers["texts.done"] == outcome.numbers["texts.asked"] == 1
    assert outcome.numbers["served"] > 9, "some came back, and served again"
