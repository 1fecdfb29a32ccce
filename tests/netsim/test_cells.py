from __future__ import annotations

from netsim.cells import CellCount
from netsim.metrics import Metrics


def test_cells_are_counted_once_each_and_copies_as_often_as_they_are_sent() -> None:
    metrics = Metrics()
    cells = CellCount(metrics, ("hop.gap-late", "hop.open-early", "driver.result-late"))
    for cell in ("hop.gap-late", "driver.result-late", "hop.gap-late"):
        cells.copied(cell)
    assert metrics.numbers() == {
        "cells": 2, "copies": 3, "copies.hop.gap-late": 2, "copies.driver.result-late": 1
    }  # fmt: skip


def test_a_check_that_wants_more_cells_is_told_which_never_came() -> None:
    metrics = Metrics()
    cells = CellCount(metrics, ("hop.gap-late", "hop.open-early"))
    assert metrics.culprits("cells", too_high=False) == ("copies.hop.gap-late", "copies.hop.open-early")
    assert "cells" not in metrics.numbers(), "a bound on what never came fails, rather than hold at 0"
    cells.copied("hop.open-early")
    assert metrics.culprits("cells", too_high=False) == ("copies.hop.gap-late",)
