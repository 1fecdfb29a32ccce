from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from peerd.demo import EXIT_NOT_STARTED, main
from peerd.demo_train import EXAMPLES, SETTINGS, TrainDemo
from peerd.loopback import DaemonFailed
from peerd.training.settings import parse_settings


def job(after: float) -> dict[str, Any]:
    progress = {"eval_before": 2.0, "eval_after": after, "steps": 9, "step": 9, "server_losses": 1}
    return {"state": "done", "reason": "", "progress": progress}


@pytest.mark.parametrize(("after", "good"), [(0.4, True), (1.5, False), (2.5, False)])
def test_only_a_clear_fall_of_the_loss_is_a_success(after: float, good: bool) -> None:
    out = io.StringIO()
    assert TrainDemo(out)._verdict(job(after)) is good
    assert f"2.000 before, {after:.3f} after" in out.getvalue()


def test_its_settings_are_a_jobs_and_hold_out_a_tenth_of_its_examples() -> None:
    settings = parse_settings(SETTINGS)
    assert round(EXAMPLES * settings.eval_split) == EXAMPLES // 10


def test_a_demo_that_can_not_run_says_why_and_leaves_a_code() -> None:
    class Broken(TrainDemo):
        def run(self, directory: object) -> int:
            raise DaemonFailed("anna ended early.")

    out = io.StringIO()
    with ThreadPoolExecutor(1) as pool:  # only in a main thread would it take over this process's signals
        assert pool.submit(main, out, Broken).result() == EXIT_NOT_STARTED
    assert "anna ended early." in out.getvalue()
