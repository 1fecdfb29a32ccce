from __future__ import annotations

import random

import pytest

from netsim import schedule
from netsim.scenario import parse_scenario
from netsim.schedule import Moment, plan

BASE = """
about = "x"
duration_s = 3600
workload = "smoke.echo"
checks = {{ asked = {{ min = 1 }} }}
hosts = {{ home = {{ count = 20, kind = "echo", start_s = [1.0, 9.0] }}, boot = {{ count = 2, kind = "echo" }} }}
{rest}
"""
CHURN = """
[churn]
groups = ["home"]
leaves_per_hour = 6.0
clean = 0.5
vanish = 0.25
freeze = 0.25
back_after_s = [10.0, 20.0]
state_lost = 0.5
"""


def planned(rest: str = "", seed: int = 1) -> tuple[Moment, ...]:
    scenario = parse_scenario(BASE.format(rest=rest), "x.toml")
    return plan(scenario, lambda purpose: random.Random(f"{seed} {purpose}"))


def faults(rest: str, seed: int = 1) -> list[Moment]:
    return [moment for moment in planned(rest, seed) if moment.action != "start" or moment.at_s > 9.0]


def test_every_host_starts_within_its_groups_time_and_moments_are_in_order() -> None:
    moments = planned()
    assert [moment.action for moment in moments] == ["start"] * 22
    assert all(1.0 <= moment.at_s <= 9.0 for moment in moments if moment.hosts[0].startswith("home"))
    assert [moment.at_s for moment in moments] == sorted(moment.at_s for moment in moments)


def test_the_same_seed_plans_the_same_and_another_seed_something_else() -> None:
    assert planned(CHURN, 3) == planned(CHURN, 3)
    assert planned(CHURN, 3) != planned(CHURN, 4)


def test_a_fault_more_moves_no_start_and_no_leave() -> None:
    with_fault = planned(CHURN + '[[faults]]\nat_s = 50\nkind = "slow"\nfactor = 2.0\nhosts = "home"\nshare = 0.5\n')
    assert [moment for moment in with_fault if moment.action != "slow"] == list(planned(CHURN))


def test_churn_has_the_rate_and_the_ways_that_were_asked_for_and_everybody_comes_back() -> None:
    moments = [moment for moment in planned(CHURN) if moment.at_s > 9.0]
    leaves = [moment for moment in moments if moment.action in ("stop", "power-off", "freeze")]
    expected = 20 * 6.0 * 3591 / (3600 + 6.0 * 15)
    assert 0.75 * expected < len(leaves) < 1.25 * expected
    assert 0.35 < sum(moment.action == "stop" for moment in leaves) / len(leaves) < 0.65
    for name in {moment.hosts[0] for moment in moments}:
        mine = [moment for moment in moments if moment.hosts == (name,)]
        for leave, back in zip(mine[::2], mine[1::2], strict=False):
            assert back.action == {"stop": "start", "power-off": "start", "freeze": "thaw"}[leave.action]
            assert 10.0 <= back.at_s - leave.at_s <= 20.0
            assert back.keep_state or back.action == "start"
    backs = [moment for moment in moments if moment.action == "start"]
    assert 0.3 < sum(moment.keep_state for moment in backs) / len(backs) < 0.7


def test_churn_keeps_to_its_time() -> None:
    leaves = [moment.at_s for moment in faults(CHURN + "from_s = 1000\nuntil_s = 2000\n") if moment.action == "stop"]
    assert leaves
    assert all(1000 <= at_s <= 2000 for at_s in leaves)


@pytest.mark.parametrize(
    ("how_many", "expected"), [("share = 0.2", 4), ("count = 3", 3), ("share = 0.001", 1), ("", 20)]
)
def test_a_fault_befalls_as_many_as_it_says_and_each_once(how_many: str, expected: int) -> None:
    (moment,) = faults(f'[[faults]]\nat_s = 50\nkind = "kill"\nhosts = "home"\n{how_many}\n')
    assert len(set(moment.hosts)) == len(moment.hosts) == expected
    assert all(name.startswith("home-") for name in moment.hosts)


def test_a_fault_with_a_duration_is_undone_for_the_same_hosts() -> None:
    freeze, thaw = faults('[[faults]]\nat_s = 50\nkind = "freeze"\nhosts = "home"\ncount = 2\nfor_s = 5\n')
    assert (freeze.action, thaw.action, thaw.at_s) == ("freeze", "thaw", 55.0)
    assert thaw.hosts == freeze.hosts


def test_a_repeated_fault_draws_its_hosts_each_time() -> None:
    moments = faults('[[faults]]\nat_s = 50\nkind = "kill"\nhosts = "home"\ncount = 3\nevery_s = 10\nuntil_s = 90\n')
    assert [moment.at_s for moment in moments] == [50.0, 60.0, 70.0, 80.0, 90.0]
    assert len({moment.hosts for moment in moments}) > 1


def test_partitions_have_the_others_on_the_other_side_and_heal_by_their_number() -> None:
    first, second, healed = faults(
        '[[faults]]\nat_s = 50\nkind = "partition"\nhosts = "home"\ncount = 5\n'
        '[[faults]]\nat_s = 60\nkind = "partition"\nhosts = "home"\nothers = "boot"\none_way = true\nfor_s = 5\n'
    )
    assert len(first.hosts) == 5
    assert len(first.others) == 17
    assert not set(first.hosts) & set(first.others)
    assert second.others == ("boot-1", "boot-2")
    assert second.one_way
    assert (healed.action, healed.amount) == ("heal", second.amount)
    assert first.amount != second.amount


def test_what_would_come_after_the_end_is_left_out() -> None:
    moments = faults('[[faults]]\nat_s = 3599\nkind = "freeze"\nhosts = "home"\nfor_s = 5\n')
    assert [moment.action for moment in moments] == ["freeze"]


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOMENTS_AT_MOST", 100)
    with pytest.raises(ValueError, match="more than 100"):
        planned(CHURN)
