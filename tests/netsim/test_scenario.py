# ruff: noqa: E501 - a table has a line for each case
"""Every refusal of a scenario names the file and the key, and the shipped ones are all taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from netsim.runner import prepare
from netsim.scenario import Bound, ScenarioError, load_scenario, parse_scenario

ROOT = Path(__file__).parents[2]
GOOD = """
about = "Something is shown."
duration_s = 60
workload = "smoke.echo"
[hosts.home]
count = 10
kind = "echo"
[hosts.boot]
count = 1
kind = "echo"
[checks]
asked = { min = 1 }
"""
FAULT = '[[faults]]\nat_s = 1.0\nkind = "kill"\nhosts = "home"\n'
CHURN = '[churn]\ngroups = ["home"]\nleaves_per_hour = 1.0\nclean = 1.0\n'


def test_a_scenario_says_what_its_file_says() -> None:
    scenario = parse_scenario(GOOD + CHURN + FAULT, "scenarios/good.toml")
    assert (scenario.name, scenario.duration_s, scenario.host_count) == ("good", 60.0, 11)
    assert scenario.churn is not None
    assert scenario.churn.back_after_s == (30.0, 600.0)
    assert [fault.kind for fault in scenario.faults] == ["kill"]
    assert scenario.checks == {"asked": Bound(min=1.0)}
    assert scenario.is_noise


def test_above_a_hundred_hosts_the_channel_is_null_unless_said() -> None:
    many = GOOD.replace("count = 10", "count = 100")
    assert not parse_scenario(many, "x.toml").is_noise
    assert parse_scenario('channel = "noise"\n' + many, "x.toml").is_noise
    assert not parse_scenario('channel = "null"\n' + many, "x.toml").is_noise


REFUSED = {
    "no table at all": ("this is no TOML", "x.toml: Expected '='"),
    "an unknown key": ("durations_s = 1\n" + GOOD, "x.toml: durations_s: is no key of this table; did you mean 'duration_s'?"),
    "an unknown key of a group": (GOOD + "[hosts.home.x]\n", "hosts.home.x: is no key"),
    "a missing key": (GOOD.replace("duration_s = 60", ""), "x.toml: duration_s: is missing"),
    "a missing key of a group": (GOOD.replace('kind = "echo"', "", 1), "hosts.home.kind: is missing"),
    "a text for a number": (GOOD.replace("= 60", '= "60"'), "duration_s: has to be a number, not '60'"),
    "truth for a number": (GOOD.replace("= 60", "= true"), "duration_s: has to be a number, not True"),
    "a number that is none": (GOOD.replace("= 60", "= nan"), "duration_s: has to be a number, not nan"),
    "a fraction for a count": (GOOD.replace("count = 10", "count = 1.5"), "hosts.home.count: has to be a whole number, not 1.5"),
    "a number for a text": (GOOD.replace('"Something is shown."', "3"), "about: has to be a text, not 3"),
    "a table for a list": (GOOD + CHURN.replace('["home"]', "{}"), "churn.groups: has to be a list, not a table"),
    "a list for a table": ("links = []\n" + GOOD, "links: has to be a table, not a list"),
    "a list for a table of names": ("settings = []\n" + GOOD, "settings: has to be a table, not a list"),
    "too long a pair": (GOOD + "[links]\nrtt_ms = [1, 2, 3]\n", "links.rtt_ms: has to be a list of 2, not of 3"),
    "a wrong item": (GOOD + "[links]\nuplink_mbit = [1, 'x']\n", "links.uplink_mbit[1]: has to be a number"),
    "no handshake of a few": ('channel = "null"\n' + GOOD.replace("count = 10", "count = 99"), "x.toml: channel: can't be null with 100 hosts or fewer"),
    "an unknown choice": ('channel = "tls"\n' + GOOD, "channel: can't be 'tls'"),
    "an unknown fault": (GOOD + FAULT.replace("kill", "kil"), "faults[0].kind: can't be 'kil'; did you mean 'kill'?"),
    "its own name": ('name = "x"\n' + GOOD, "name: is the file's own name"),
    "nothing to say": (GOOD.replace("Something is shown.", " "), "about: has to say"),
    "no time": (GOOD.replace("= 60", "= 0"), "duration_s: has to be over 0"),
    "no real time": ("real_s_max = 0\n" + GOOD, "real_s_max: has to be over 0"),
    "no memory": ("rss_mib_max = 0\n" + GOOD, "rss_mib_max: has to be over 0"),
    "an empty expected error": ('expected_errors = [""]\n' + GOOD, "expected_errors: can't be empty"),
    "no hosts": (GOOD[: GOOD.index("[hosts.home]")] + "[hosts]\n[checks]\nasked = {min = 1}\n", "hosts: has to have a group"),
    "an empty group": (GOOD.replace("count = 10", "count = 0"), "hosts.home.count: has to be 1 or more"),
    "too many hosts": (GOOD.replace("count = 10", "count = 20000"), "hosts: has more than 20000"),
    "nothing checked": (GOOD[: GOOD.index("asked")], "checks: has to bound something"),
    "a check without a bound": (GOOD.replace("{ min = 1 }", "{}"), "checks.asked: a check needs min, max or both"),
    "starts that fall": (GOOD.replace("count = 10", "count = 10\nstart_s = [2, 1]"), "hosts.home.start_s: has to rise"),
    "skews that fall": (GOOD.replace("count = 10", "count = 10\nclock_skew_s = [2, 1]"), "hosts.home.clock_skew_s: has to rise"),
    "an unknown NAT": (GOOD.replace("count = 10", "count = 10\nnat = {full-con = 1}"), "did you mean 'full-cone'?"),
    "shares of NATs over 1": (GOOD.replace("count = 10", "count = 10\nnat = {open = 0.6, symmetric = 0.6}"), "hosts.home.nat: has shares that sum to 1"),
    "a negative share": (GOOD.replace("count = 10", "count = 10\nnat = {open = 1.5, symmetric = -0.5}"), "hosts.home.nat: has no negative"),
    "a rate of nothing": (GOOD.replace("count = 10", "count = 10\nuplink_mbit = [0]"), "hosts.home.uplink_mbit: has to be over 0"),
    "a negative flush": (GOOD.replace("count = 10", "count = 10\ndisk_flush_s = -1"), "hosts.home.disk_flush_s: has to be"),
    "round trips of nothing": (GOOD + "[links]\nrtt_ms = [0, 1]\n", "links.rtt_ms: has to rise, from 0.001"),
    "negative jitter": (GOOD + "[links]\njitter_ms = -1\n", "links.jitter_ms: has to be 0 or more"),
    "a loss of half": (GOOD + "[links]\nloss = 0.5\n", "links.loss: has to be a share under 0.5"),
    "a path of nothing": (GOOD + "[links]\npath_mbit = 0\n", "links.path_mbit: has to be over 0"),
    "no buffer": (GOOD + "[links]\nsend_buffer_kib = 0\n", "links.send_buffer_kib: has to be over 0"),
    "an uplink of nothing": (GOOD + "[links]\nuplink_mbit = [0]\n", "links.uplink_mbit: has to be over 0"),
    "churn of nobody": (GOOD + CHURN.replace('["home"]', "[]"), "churn.groups: has to name a group"),
    "churn of strangers": (GOOD + CHURN.replace('["home"]', '["away"]'), "churn.groups: names no group: 'away'"),
    "churn that never comes": (GOOD + CHURN.replace("= 1.0", "= 0", 1), "churn.leaves_per_hour: has to be over 0"),
    "ways to leave over 1": (GOOD + CHURN + "crash = 0.5\n", "churn.clean: with crash, vanish, freeze and sleep has to sum to 1"),
    "returns that fall": (GOOD + CHURN + "back_after_s = [2, 1]\n", "churn.back_after_s: has to rise"),
    "more lost than there is": (GOOD + CHURN + "state_lost = 2\n", "churn.state_lost: has to be a share"),
    "churn from before": (GOOD + CHURN + "from_s = -1\n", "churn.from_s: has to be 0 or more"),
    "churn that ends first": (GOOD + CHURN + "from_s = 5\nuntil_s = 5\n", "churn.until_s: has to be after from_s"),
    "a fault before": (GOOD + FAULT.replace("at_s = 1.0", "at_s = -1"), "faults[0].at_s: has to be 0 or more"),
    "a fault after the end": (GOOD + FAULT.replace("at_s = 1.0", "at_s = 61"), "faults[0].at_s: is after the end"),
    "a fault of nobody": (GOOD + FAULT.replace('hosts = "home"', ""), "faults[0].hosts: or names has to be given"),
    "a fault of both": (GOOD + FAULT + 'names = ["home-1"]\n', "faults[0].hosts: or names has to be given, and not both"),
    "a fault of strangers": (GOOD + FAULT.replace('"home"', '"away"'), "faults[0].hosts: names no group: 'away'"),
    "a fault of a stranger": (GOOD + FAULT.replace('hosts = "home"', 'names = ["home-11"]'), "faults[0].names: names no host: 'home-11'"),
    "a share and a count": (GOOD + FAULT + "share = 0.5\ncount = 1\n", "faults[0].share: can't be given together"),
    "a share of names": (GOOD + FAULT.replace('hosts = "home"', 'names = ["home-1"]') + "count = 1\n", "faults[0].names: goes with neither"),
    "a share over 1": (GOOD + FAULT + "share = 2\n", "faults[0].share: has to be over 0 and at most 1"),
    "a count of none": (GOOD + FAULT + "count = 0\n", "faults[0].count: has to be over 0"),
    "a duration of nothing": (GOOD + FAULT + "for_s = 0\n", "faults[0].for_s: has to be over 0"),
    "an undone moment": (GOOD + FAULT.replace("kill", "restart") + "for_s = 1\n", "faults[0].for_s: has no meaning for restart"),
    "an interval without an end": (GOOD + FAULT + "every_s = 1\n", "faults[0].every_s: and until_s go together"),
    "an interval of nothing": (GOOD + FAULT + "every_s = 0\nuntil_s = 2\n", "faults[0].every_s: has to be over 0"),
    "others of a kill": (GOOD + FAULT + 'others = "boot"\n', "faults[0].others: belongs to partition and reset and degrade, not to kill"),
    "one way of a kill": (GOOD + FAULT + "one_way = true\n", "faults[0].one_way: belongs to"),
    "seconds of a kill": (GOOD + FAULT + "seconds = 2\n", "faults[0].seconds: belongs to clock-step"),
    "a factor of a kill": (GOOD + FAULT + "factor = 2\n", "faults[0].factor: belongs to slow and degrade"),
    "a loss of a kill": (GOOD + FAULT + "loss = 0.2\n", "faults[0].loss: belongs to degrade"),
    "how a kill lies": (GOOD + FAULT + 'how = "x"\n', "faults[0].how: belongs to lie"),
    "others that are strangers": (GOOD + FAULT.replace("kill", "partition") + 'others = "away"\n', "faults[0].others: names no group: 'away'"),
    "a step of nothing": (GOOD + FAULT.replace("kill", "clock-step"), "faults[0].seconds: is missing"),
    "slow by nothing": (GOOD + FAULT.replace("kill", "slow"), "faults[0].factor: has to be over 0"),
    "degraded by nothing": (GOOD + FAULT.replace("kill", "degrade"), "faults[0].factor: or loss is missing"),
    "a negative factor": (GOOD + FAULT.replace("kill", "degrade") + "factor = -1\n", "faults[0].factor: has to be over 0"),
    "a loss over 1": (GOOD + FAULT.replace("kill", "degrade") + "loss = 1\n", "faults[0].loss: has to be a share"),
    "a lie of no kind": (GOOD + FAULT.replace("kill", "lie"), "faults[0].how: is missing"),
    "a freeze that loses the disk": (GOOD + FAULT.replace("kill", "freeze") + "keep_state = false\n", "faults[0].keep_state: goes with starts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_file_and_key(case: str) -> None:
    text, expected = REFUSED[case]
    with pytest.raises(ScenarioError) as refused:
        parse_scenario(text, "scenarios/x.toml")
    assert str(refused.value).startswith("scenarios/x.toml: ")
    assert expected in str(refused.value)


UNFOUND = {
    "an unknown module of workloads": (GOOD.replace("smoke.echo", "smock.echo"), "workload: there is no module of workloads 'smock'"),
    "an unknown workload": (GOOD.replace("smoke.echo", "smoke.ech"), "workload: 'smoke' has no workload 'ech'; it has echo"),
    "an unknown setting": (GOOD + "[settings]\nasks = 1\n", "settings.asks: is no key of this table"),
    "an unknown kind of peer": (GOOD.replace('kind = "echo"', 'kind = "ecco"', 1), "hosts: there is no kind of peer 'ecco'"),
    "an unknown setting of a peer": (GOOD + "[hosts.home.settings]\nstop = 1\n", "hosts.home.settings.stop: is no key"),
    "an unknown metric": (GOOD.replace("asked =", "aske ="), "checks.aske: isn't measured by this workload; did you mean 'asked'?"),
    "an unknown statistic": (GOOD.replace("asked =", '"answer_s.p98" ='), "checks.answer_s.p98: isn't measured"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFOUND)
def test_names_that_lead_nowhere_are_refused_with_file_and_key(case: str, tmp_path: Path) -> None:
    text, expected = UNFOUND[case]
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(ScenarioError) as refused:
        prepare(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert expected in str(refused.value)


def test_a_file_that_is_not_there_is_a_refusal_too(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.toml: can't be read"):
        load_scenario(tmp_path / "none.toml")


def test_a_python_file_may_build_the_scenario(tmp_path: Path) -> None:
    file = tmp_path / "odd.py"
    file.write_text(f"from netsim.scenario import parse_scenario\nSCENARIO = parse_scenario('''{GOOD}''', 'x.toml')\n")
    assert load_scenario(file).name == "odd"
    file.write_text("SCENARIO = 3\n")
    with pytest.raises(ScenarioError, match=r"odd\.py: SCENARIO is no Scenario"):
        load_scenario(file)


@pytest.mark.parametrize("file", sorted((ROOT / "scenarios").glob("*.*")), ids=lambda file: file.stem)
def test_every_scenario_of_the_tree_is_taken(file: Path) -> None:
    prepared = prepare(file)
    assert prepared.scenario.checks


@pytest.mark.parametrize(
    ("bound", "value", "holds", "said"),
    [
        (Bound(min=1.0), 1.0, True, ">= 1"),
        (Bound(min=1.0), 0.99, False, ">= 1"),
        (Bound(max=3.0), 3.0, True, "<= 3"),
        (Bound(max=3.0), 3.01, False, "<= 3"),
        (Bound(1.0, 2.0), 1.5, True, ">= 1, <= 2"),
        (Bound(0.0, 0.0), 0.0, True, "= 0"),
        (Bound(max=3.0), None, False, "<= 3"),
    ],
)
def test_a_bound_holds_within_and_never_for_what_was_not_measured(
    bound: Bound, value: float | None, holds: bool, said: str
) -> None:
    assert bound.holds(value) is holds
    assert str(bound) == said
