"""Servers whose numbers are wrong and whose shapes are right: production can't tell today, so the simulator has to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blocks.protocol.device import BackwardJob, Batch, JobResult
from netsim.__main__ import main
from netsim.arithmetic import part_of
from netsim.devices import Lie, lied
from netsim.runner import prepare, run_seed
from routing.types import Span

SCENARIOS = Path(__file__).parents[2] / "scenarios"
HOSTS = {"boot": 1, "server": 4, "driver": 1}


def test_a_text_through_a_liar_fails_the_run_and_names_its_session(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (SCENARIOS / "session-loss.toml").read_text()
    kinds = text.partition("strikes = ")[2].partition("\n")[0]
    text = text.replace(kinds, '["lie-numbers"]').replace("texts = 6", "texts = 1\nleases_end_s = 0.0")
    for group, count in (("boot", 2), ("server", 8), ("driver", 2)):
        text = text.replace(f"[hosts.{group}]\ncount = {count}", f"[hosts.{group}]\ncount = {HOSTS[group]}")
    checks = '[checks]\n"texts.done" = { min = 1.0 }\n"texts.wrong" = { max = 0.0 }\n'
    scenario = tmp_path / "liar.toml"
    scenario.write_text(text.partition("[checks]")[0] + checks)
    assert main(["run", str(scenario), "--seed", "1"]) == 1
    said = capfd.readouterr().out
    assert "texts.wrong is 1, wanted <= 0 (of " in said
    story = said.partition("the story of ")[2]
    assert "lie-numbers of hop" in story, "it says which hop lied, and since when"
    assert said.splitlines()[-1].startswith("trace hash: ")


def test_gradients_of_a_liar_fail_the_run_and_name_their_driver() -> None:
    prepared = prepare(SCENARIOS / "call-loss.toml")
    scenario = prepared.scenario
    hosts = {group: replace(told, count=HOSTS[group]) for group, told in scenario.hosts.items()}
    settings = replace(prepared.settings, batches=1, strikes=("lie-numbers",), strike_at_s=(0.0, 0.0))
    outcome = run_seed(replace(prepared, scenario=replace(scenario, hosts=hosts), settings=settings), 1)
    assert outcome.numbers["batches.wrong"] == 1
    assert not outcome.passed
    assert outcome.stories["driver-1"]


@pytest.mark.parametrize("lie", list(Lie))
def test_gradients_are_lied_about_as_outputs_are(lie: Lie) -> None:
    states = part_of(np.ones((1, 2, 4), np.int64))
    job = BackwardJob("model", Span(0, 1), Batch(states), states)
    assert lied(JobResult(job, hidden=states), lie).hidden != states
