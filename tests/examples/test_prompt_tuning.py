"""The examples run as they are printed, against a real daemon, in a short form."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.e2e.processes import wait_until
from tests.peerd.in_process import daemon

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_prompt_tuning_learns_the_style_in_a_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["prompt_tuning.py", "4"])
    with daemon(tmp_path / "state", "--model", "demo") as node:
        wait_until(lambda: any(model["state"] == "online" for model in node.client.status()["models"]))
        monkeypatch.setenv("PEERD_SOCKET", str(node.socket_path))
        runpy.run_path(str(EXAMPLES / "prompt_tuning.py"))
        assert node.client.status()["sessions"] == []
    printed = capsys.readouterr().out
    before, after = (float(found) for found in re.findall(r"loss (?:before|after): ([\d.]+)", printed))
    assert after < 0.8 * before
    assert len(re.findall(r"step \d/4: loss", printed)) == 4
    without, _ = re.findall(r"opposite of small\? With[^:]*: (\S.*)", printed)
    assert without == "The opposite of small is big."  # with the prompt it is still that, after so few steps
