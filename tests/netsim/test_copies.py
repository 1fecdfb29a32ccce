"""Copies of session messages in the short form of their scenario, and hops that take them wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest

from blocks.protocol.cells import HOP_CELLS, Age, HopRule
from netsim.copies import CELLS
from netsim.scenario import Bound
from tests.netsim.test_sessions import ran, short


def test_copies_that_come_twice_early_late_or_swapped_cost_no_token() -> None:
    outcome = ran("session-copies", 2, checks={"cells": Bound(min=len(CELLS) + 1)}, texts=1, copies=0.2)
    assert outcome.numbers["cells"] > len(CELLS) / 2
    (check,) = (check for check in outcome.checks if check.metric == "cells")
    assert len(check.culprits) == len(CELLS) - outcome.numbers["cells"] > 0, "the cells that never came are named"
    assert outcome.numbers["replays"] >= 1
    assert outcome.numbers["journal.answers"] >= 1
    assert outcome.numbers["emptied"] >= 1
    assert outcome.numbers["misanswered"] == 0 < outcome.numbers["answers.conflict"]


@pytest.mark.parametrize(
    "windows",
    [
        {Age.LOWER: HopRule.WINDOW, Age.EQUAL: HopRule.WINDOW, Age.HIGHER: HopRule.HOLD},
        {Age.LOWER: HopRule.IGNORE, Age.EQUAL: HopRule.WINDOW, Age.HIGHER: HopRule.WINDOW},
    ],
)
def test_a_hop_that_takes_windows_of_other_epochs_or_answers_nothing_where_the_table_says_what_is_seen(
    monkeypatch: pytest.MonkeyPatch, windows: Mapping[Age, HopRule]
) -> None:
    """Texts come out right all the same, so that only what the hop did, and said, gives it away."""
    cells = cast(dict[str, Mapping[Age, HopRule]], HOP_CELLS)
    monkeypatch.setitem(cells, "window", windows)
    monkeypatch.setitem(cells, "reserved", dict.fromkeys(Age, HopRule.IGNORE))
    outcome = short("session-copies", 4, texts=1, new_tokens=(16, 24), copies=0.2)
    assert outcome.numbers["unasked"] >= 1
    assert outcome.numbers["misanswered"] >= outcome.numbers["copies.hop.fork-early"] >= 1
    assert not outcome.passed
